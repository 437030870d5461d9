# libquire_cpu.so: each kernel source once for each instruction set, the rest once for the plain machine.

file(GLOB cpu_sources CONFIGURE_DEPENDS cpu/*.cpp)
set(kernel_sources)
foreach(name norm activation rotary attention matmul_float matmul_bfloat16 matmul_quantized decoder_rows decoder_attention
             decoder_sampling kernels)
  list(APPEND kernel_sources ${CMAKE_CURRENT_SOURCE_DIR}/cpu/${name}.cpp)
endforeach()
list(REMOVE_ITEM cpu_sources ${kernel_sources})

# -ffp-contract=off: a multiplication and an addition fuse only where the source says fma, so that a vector path and
# its remainder, or two compilers, do not differ.
set(cpu_options -Wall -Wextra -ffp-contract=off)
if(QUIRE_SANITIZE)
  # Without --no-undefined: the sanitizers' functions come from a preloaded library.
  list(APPEND cpu_options -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g)
endif()

find_package(Threads REQUIRED)
add_library(quire_cpu SHARED ${cpu_sources})
target_include_directories(quire_cpu PRIVATE include cpu)
target_compile_options(quire_cpu PRIVATE ${cpu_options})
target_link_libraries(quire_cpu PRIVATE Threads::Threads)

function(quire_cpu_isa isa)
  add_library(quire_cpu_${isa} OBJECT ${kernel_sources})
  target_include_directories(quire_cpu_${isa} PRIVATE include cpu)
  target_compile_definitions(quire_cpu_${isa} PRIVATE QUIRE_ISA=${isa})
  target_compile_options(quire_cpu_${isa} PRIVATE ${cpu_options} ${ARGN})
  target_sources(quire_cpu PRIVATE $<TARGET_OBJECTS:quire_cpu_${isa}>)
endfunction()

quire_cpu_isa(scalar)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  # No more than cpu/isa.cpp asks the machine for.
  set(avx2 -mavx2 -mfma -mf16c)
  quire_cpu_isa(avx2 ${avx2})
  if(QUIRE_AVX512)
    target_compile_definitions(quire_cpu PRIVATE QUIRE_AVX512)
    if(QUIRE_EMULATE_AVX512)
      find_path(SIMDE_INCLUDE_DIR simde/x86/avx512.h REQUIRED)
      # GCC notes that it would pass vectors otherwise if the machine had AVX-512; all that do so are inlined here.
      set(avx512 ${avx2} -DQUIRE_EMULATE_AVX512 -Wno-psabi)
      quire_cpu_isa(avx512 ${avx512})
      quire_cpu_isa(avx512_bf16 ${avx512} -DQUIRE_AVX512_BF16)
      foreach(isa avx512 avx512_bf16)
        target_include_directories(quire_cpu_${isa} SYSTEM PRIVATE ${SIMDE_INCLUDE_DIR})
      endforeach()
      target_compile_definitions(quire_cpu PRIVATE QUIRE_EMULATE_AVX512)
    else()
      set(avx512 -mavx512f -mavx512bw -mavx512cd -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c)
      quire_cpu_isa(avx512 ${avx512})
      quire_cpu_isa(avx512_bf16 ${avx512} -mavx512bf16)
    endif()
  endif()
endif()

quire_library(quire_cpu)
if(QUIRE_SANITIZE)
  target_link_options(quire_cpu PRIVATE -fsanitize=address,undefined "LINKER:-z,undefs")
endif()
