#include "integrations/cli/document.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <string_view>

#include "base/units.h"
#include "integrations/cli/utf8.h"

namespace prehoc::cli {
namespace {

constexpr uint64_t kMostBytes = kGiB;  // what the tokenizer takes
constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";

Result<std::string> ReadFile(const std::string& path, const std::string& flag) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return {StatusCode::kUnsupported, flag + ": a directory; give a text file"};
  }
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    const StatusCode code = errno == ENOENT ? StatusCode::kNotFound : StatusCode::kIoError;
    return {code, flag + ": " + std::strerror(errno) + "; give a UTF-8 text file that can be read"};
  }
  std::string text;
  std::string piece(size_t{1} << 20, '\0');
  while (file.read(piece.data(), static_cast<std::streamsize>(piece.size())) || file.gcount() > 0) {
    text.append(piece, 0, static_cast<size_t>(file.gcount()));
    if (text.size() > kMostBytes) return {StatusCode::kUnsupported, flag + ": more than 1 GiB; give a part of it"};
  }
  if (file.bad()) return {StatusCode::kIoError, flag + ": reading failed: " + std::strerror(errno)};
  return text;
}

}  // namespace

Result<Document> ReadDocument(const std::string& path, const Environment& environment) {
  Document document{path, ""};
  if (path.empty()) {
    document.path = environment.documents_dir() + "/king-james.txt";
    std::error_code error;
    if (environment.cache_dir.empty() || !std::filesystem::exists(document.path, error)) {
      return {StatusCode::kNotFound, "the default document " + document.path +
                                         " is missing; write it with scripts/fetch_document.sh, or give --document FILE"};
    }
  }
  const std::string flag = "--document " + document.path;
  PREHOC_ASSIGN_OR_RETURN(document.text, ReadFile(document.path, flag));
  if (document.text.starts_with(kByteOrderMark)) document.text.erase(0, kByteOrderMark.size());
  if (document.text.empty()) return {StatusCode::kCorrupt, flag + ": the file is empty; give one with text"};
  const std::optional<size_t> invalid = FirstInvalidUtf8(document.text);
  if (!invalid) return document;
  return {StatusCode::kCorrupt, flag + ": not UTF-8 at byte " + std::to_string(*invalid) +
                                    "; convert it, for example with iconv -f latin1 -t utf-8"};
}

}  // namespace prehoc::cli
