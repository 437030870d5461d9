# libquire_balancer.so: the balancer's core. -ffp-contract=off, so that it chooses as its Python reference does.
file(GLOB balancer_sources CONFIGURE_DEPENDS balancer/*.cpp)
add_library(quire_balancer SHARED ${balancer_sources})
target_include_directories(quire_balancer PRIVATE include balancer)
target_compile_options(quire_balancer PRIVATE -Wall -Wextra -ffp-contract=off)
quire_library(quire_balancer)
