# Writes the bytes of INPUT as a C++ source that defines NAME and NAMESize in prehoc::cli:
#   cmake -DINPUT=... -DOUTPUT=... -DNAME=... -P embed_file.cmake
file(READ ${INPUT} bytes HEX)
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," bytes "${bytes}")
string(REGEX REPLACE "((0x..,){1,24})" "\\1\n" bytes "${bytes}")
get_filename_component(file ${INPUT} NAME)
file(WRITE ${OUTPUT} "// The bytes of ${file}.
#include <cstddef>
namespace prehoc::cli {
extern const unsigned char ${NAME}[];
extern const size_t ${NAME}Size;
const unsigned char ${NAME}[] = {
${bytes}};
const size_t ${NAME}Size = sizeof(${NAME});
}  // namespace prehoc::cli
")
