# The vector backends. Only the two *_ops.cc files may use instructions beyond the baseline: the rest runs before the CPU is
# known. Contraction is off because encode promises the roundings of the reference; products that should fuse say so.
# g++ 12 reports the "undefined" operands inside its own AVX-512 headers as uninitialised (its PR 105593).
target_sources(prehoc_kernels PRIVATE
  cpu/attend.cc cpu/choose.cc cpu/codes.cc cpu/prefill.cc cpu/rows.cc cpu/tables.cc cpu/top_keys.cc
  cpu/avx2_ops.cc cpu/avx512_ops.cc)
set_source_files_properties(cpu/avx2_ops.cc PROPERTIES COMPILE_OPTIONS
  "-mavx2;-mfma;-mf16c;-ffp-contract=off;-fno-math-errno")
set_source_files_properties(cpu/avx512_ops.cc PROPERTIES COMPILE_OPTIONS
  "-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mavx512vnni;-ffp-contract=off;-fno-math-errno;-Wno-uninitialized;$<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>")
target_compile_definitions(prehoc_kernels PRIVATE PREHOC_VECTOR_KERNELS)

# Sanitizers add weak symbols of their own.
if(PREHOC_BUILD_TESTS AND NOT PREHOC_SANITIZE)
  add_test(NAME kernels_vector_objects COMMAND ${CMAKE_COMMAND} -DNM=${CMAKE_NM}
    "-DOBJECTS=$<TARGET_OBJECTS:prehoc_kernels>" -P ${CMAKE_CURRENT_LIST_DIR}/check_objects.cmake)
endif()
