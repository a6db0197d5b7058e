# Flags for our own code only: linked PRIVATE, so that users of the library never inherit them.
add_library(prehoc_flags INTERFACE)
target_compile_features(prehoc_flags INTERFACE cxx_std_20)
target_compile_options(prehoc_flags INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wpedantic;-Wshadow;-Wnon-virtual-dtor;-Wno-missing-field-initializers>
  # False alarms of GCC 12 at -O3 inside its own std::string and std::vector (as its bug 105651).
  $<$<AND:$<COMPILE_LANG_AND_ID:CXX,GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-restrict;-Wno-stringop-overflow>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${PREHOC_WERROR}>>:-Werror>
  # nvcc 13.0 reports a plain assignment of a [[nodiscard]] class as a drop; real drops stay reported.
  $<$<COMPILE_LANGUAGE:CUDA>:-diag-suppress=2810>)
if(PREHOC_TEST_POINTS)
  target_compile_definitions(prehoc_flags INTERFACE PREHOC_TEST_POINTS)
endif()
if(PREHOC_SANITIZE)
  target_compile_options(prehoc_flags INTERFACE -fsanitize=${PREHOC_SANITIZE} -fno-omit-frame-pointer -g1)
  target_link_options(prehoc_flags INTERFACE -fsanitize=${PREHOC_SANITIZE})
  if(PREHOC_NO_SANITIZE)
    target_compile_options(prehoc_flags INTERFACE -fno-sanitize=${PREHOC_NO_SANITIZE})
  endif()
  if(PREHOC_SANITIZE MATCHES "undefined")
    target_compile_options(prehoc_flags INTERFACE -fno-sanitize-recover=undefined)
  endif()
endif()
