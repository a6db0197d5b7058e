# prehoc_library(NAME SRCS ... HDRS ... DEPS ...): one library of ours, as prehoc::NAME.
function(prehoc_library name)
  cmake_parse_arguments(ARG "" "" "SRCS;HDRS;DEPS;PRIVATE_DEPS" ${ARGN})
  add_library(prehoc_${name} STATIC ${ARG_SRCS})
  add_library(prehoc::${name} ALIAS prehoc_${name})
  target_sources(prehoc_${name} PUBLIC FILE_SET HEADERS BASE_DIRS ${PROJECT_SOURCE_DIR} FILES ${ARG_HDRS})
  target_link_libraries(prehoc_${name} PUBLIC ${ARG_DEPS} PRIVATE ${ARG_PRIVATE_DEPS} prehoc_flags)
  set_target_properties(prehoc_${name} PROPERTIES POSITION_INDEPENDENT_CODE ON
    VERIFY_INTERFACE_HEADER_SETS ${PREHOC_VERIFY_HEADERS})
endfunction()
