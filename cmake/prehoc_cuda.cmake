# PREHOC_ENABLE_CUDA: ON where a CUDA toolkit is found, unless said otherwise. It adds targets named *_cuda, and `prehoc` gains
# --device cuda; nothing else changes. The fat binary holds machine code for sm_80 and sm_90, and PTX for what follows.
include(CheckLanguage)
if(NOT DEFINED CACHE{PREHOC_ENABLE_CUDA})
  check_language(CUDA)
  set(prehoc_cuda_found OFF)
  if(CMAKE_CUDA_COMPILER)
    set(prehoc_cuda_found ON)
  endif()
endif()
option(PREHOC_ENABLE_CUDA "Build the CUDA targets" ${prehoc_cuda_found})
if(NOT PREHOC_ENABLE_CUDA)
  return()
endif()
set(PREHOC_CUDA_ARCHITECTURES "80-real;90" CACHE STRING
  "As CMAKE_CUDA_ARCHITECTURES. 80-virtual alone runs the A100 code on newer devices, through the driver's compiler")
set(CMAKE_CUDA_ARCHITECTURES ${PREHOC_CUDA_ARCHITECTURES})
enable_language(CUDA)
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know nvcc 13's
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # binaries travel to machines that have only the driver
if(CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()
find_package(CUDAToolkit REQUIRED)
# Device code of all variants is large: a sixth of the size, unpacked when a kernel is first used.
set(prehoc_cuda_compression $<$<VERSION_GREATER_EQUAL:${CMAKE_CUDA_COMPILER_VERSION},12.8>:--compress-mode=size>)
add_custom_target(gpu)  # everything that the CUDA build adds

# prehoc_cuda_target(NAME): flags of our CUDA code, and a place in the target `gpu`.
function(prehoc_cuda_target name)
  target_compile_options(${name} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo --threads=2 ${prehoc_cuda_compression}
      -Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers>
    $<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${PREHOC_WERROR}>>:-Werror=all-warnings>)
  add_dependencies(gpu ${name})
endfunction()
