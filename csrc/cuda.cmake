# libquire_cuda.so: machine code for sm_80 and sm_90a, and PTX that later GPUs translate; the CUDA runtime inside.

if(QUIRE_CUDA STREQUAL "OFF")
  return()
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(QUIRE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "QUIRE_CUDA=ON, but no working nvcc was found")
  endif()
  message(STATUS "No nvcc: libquire_cuda.so is left out")
  return()
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF) # the -gencode options below say it, also to a CMake that does not know sm_90a
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)

file(GLOB cuda_sources CONFIGURE_DEPENDS cuda/*.cu)
add_library(quire_cuda SHARED ${cuda_sources})
target_include_directories(quire_cuda PRIVATE include cuda)
set_target_properties(quire_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden)
target_compile_options(
  quire_cuda
  PRIVATE -Xcompiler=-Wall,-Wextra
          -Xptxas=-v
          "SHELL:-gencode arch=compute_80,code=sm_80"
          "SHELL:-gencode arch=compute_90a,code=sm_90a"
          "SHELL:-gencode arch=compute_90,code=compute_90")

# What ptxas says of registers and spills goes to a file beside each object, and from there to one for the library,
# which a test reads.
set_target_properties(quire_cuda PROPERTIES CUDA_COMPILER_LAUNCHER
                                            "sh;${CMAKE_CURRENT_SOURCE_DIR}/cuda/keep_ptxas_log.sh")
add_custom_command(
  TARGET quire_cuda
  POST_BUILD
  COMMAND cat "$<JOIN:$<TARGET_OBJECTS:quire_cuda>,.ptxas;>.ptxas" > "${CMAKE_BINARY_DIR}/libquire_cuda.ptxas"
  COMMAND_EXPAND_LISTS VERBATIM)

quire_library(quire_cuda)
