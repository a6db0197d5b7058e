#include "transfer/store_directory.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "transfer/record_format.h"

namespace prehoc {
namespace {
namespace fs = std::filesystem;

constexpr std::string_view kFirstLine = "prehoc store";

std::string Hex(const std::array<uint8_t, 32>& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const uint8_t byte : bytes) {
    text += kDigits[byte >> 4];
    text += kDigits[byte & 15];
  }
  return text;
}

bool ParseHex(std::string_view text, std::array<uint8_t, 32>* bytes) {
  if (text.size() != 64) return false;
  for (size_t i = 0; i < 32; ++i) {
    const char* begin = text.data() + 2 * i;
    const auto [end, error] = std::from_chars(begin, begin + 2, (*bytes)[i], 16);
    if (error != std::errc() || end != begin + 2) return false;
  }
  return true;
}

template <class Int>
bool ParseInt(std::string_view text, Int* value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return error == std::errc() && end == text.data() + text.size();
}

// Names are for people: a line break in one must not look like a field.
std::string OneLine(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20) c = ' ';
  }
  return text;
}

Status Io(const std::string& path, const char* what, int error) {
  return {error == ENOSPC ? StatusCode::kOutOfSpace : StatusCode::kIoError,
          "store " + path + ": " + what + ": " + std::strerror(error)};
}

// Each directory that is missing, with mode 0700 whatever the umask adds.
Status MakeDirectories(const std::string& path) {
  std::string prefix;
  for (const fs::path& part : fs::path(path)) {
    prefix = (fs::path(prefix) / part).string();
    if (::mkdir(prefix.c_str(), 0700) != 0 && errno != EEXIST && !fs::is_directory(prefix)) {
      return Io(path, ("cannot create " + prefix).c_str(), errno);
    }
  }
  return {};
}

Status WriteNote(const std::string& path, const std::string& text) {
  const std::string name = path + "/" + kStoreNoteName;
  const std::string temporary = name + ".tmp";
  const int fd = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) return Io(path, "cannot write into it", errno);
  int error = 0;
  for (size_t done = 0; done < text.size() && error == 0;) {
    const ssize_t n = ::write(fd, text.data() + done, text.size() - done);
    if (n < 0 && errno != EINTR) error = errno;
    if (n > 0) done += static_cast<size_t>(n);
  }
  if (error == 0 && ::fsync(fd) != 0) error = errno;
  if (::close(fd) != 0 && error == 0) error = errno;
  if (error == 0 && ::rename(temporary.c_str(), name.c_str()) != 0) error = errno;
  if (error != 0) {
    ::unlink(temporary.c_str());
    return Io(path, "cannot write its note", error);
  }
  return {};
}

}  // namespace

std::string FormatStoreNote(const StoreNote& note) {
  std::ostringstream out;
  out << kFirstLine << "\nstore " << note.store_version << "\nformat " << note.identity.format_version << "\ndtype "
      << OneLine(note.identity.dtype) << "\nlayout " << OneLine(note.identity.layout) << "\nmodel "
      << Hex(note.identity.model) << "\nmodel_name " << OneLine(note.identity.model_name) << "\nchunk_bytes "
      << note.chunk_bytes << "\n";
  return out.str();
}

namespace {

// The store version of a note that this program cannot read, if it is a later one.
int LaterVersion(std::string_view text) {
  const std::string begin = std::string(kFirstLine) + "\nstore ";
  if (!text.starts_with(begin)) return 0;
  text.remove_prefix(begin.size());
  int version = 0;
  return ParseInt(text.substr(0, text.find('\n')), &version) && version > kStoreVersion ? version : 0;
}

Result<StoreNote> ParseKnownNote(std::string_view text) {
  const std::string_view whole = text;
  const auto take = [&](std::string_view label) -> Result<std::string> {
    const size_t end = text.find('\n');
    if (end == std::string_view::npos || !text.starts_with(label)) {
      return {StatusCode::kCorrupt,
              "the note '" + std::string(kStoreNoteName) + "' lacks '" + std::string(label) + "'"};
    }
    std::string value(text.substr(label.size(), end - std::min(end, label.size())));
    text.remove_prefix(end + 1);
    return value;
  };
  StoreNote note;
  PREHOC_ASSIGN_OR_RETURN(const std::string rest, take(kFirstLine));
  PREHOC_ASSIGN_OR_RETURN(const std::string store, take("store "));
  PREHOC_ASSIGN_OR_RETURN(const std::string format, take("format "));
  PREHOC_ASSIGN_OR_RETURN(note.identity.dtype, take("dtype "));
  PREHOC_ASSIGN_OR_RETURN(note.identity.layout, take("layout "));
  PREHOC_ASSIGN_OR_RETURN(const std::string model, take("model "));
  PREHOC_ASSIGN_OR_RETURN(note.identity.model_name, take("model_name "));
  PREHOC_ASSIGN_OR_RETURN(const std::string chunk, take("chunk_bytes "));
  if (!rest.empty() || !ParseInt(store, &note.store_version) || !ParseInt(format, &note.identity.format_version) ||
      !ParseHex(model, &note.identity.model) || !ParseInt(chunk, &note.chunk_bytes) || FormatStoreNote(note) != whole) {
    return {StatusCode::kCorrupt, "the note '" + std::string(kStoreNoteName) + "' has a malformed value"};
  }
  return note;
}

bool IsTable(std::string_view name) {
  return name.size() > 4 && name.ends_with(".sst") && name.find_first_not_of("0123456789") == name.size() - 4;
}

// What a store's directory may hold besides tables.
bool IsOther(std::string_view name) {
  for (const std::string_view exact : {"CURRENT", "IDENTITY", "LOCK", "LOG"}) {
    if (name == exact) return true;
  }
  if (name == kStoreNoteName || name == std::string(kStoreNoteName) + ".tmp") return true;
  for (const std::string_view prefix : {"MANIFEST-", "OPTIONS-"}) {
    if (name.starts_with(prefix)) return name.substr(prefix.size()).find_first_not_of("0123456789.dbtmp") == std::string_view::npos;
  }
  for (const std::string_view suffix : {".dbtmp", ".log"}) {  // an empty log is made even though nothing is logged
    if (name.size() > suffix.size() && name.ends_with(suffix)) {
      return name.find_first_not_of("0123456789") == name.size() - suffix.size();
    }
  }
  return false;
}

std::string FirstLineOf(const std::string& path) {
  std::string line;
  std::getline(std::ifstream(path, std::ios::binary), line);
  return line;
}

}  // namespace

Result<StoreNote> ParseStoreNote(std::string_view text) {
  Result<StoreNote> note = ParseKnownNote(text);
  const int later = LaterVersion(text);
  if (note.ok() || later == 0) return note;
  return {StatusCode::kUnsupported, "was written by a newer program: store version " + std::to_string(later) +
                                        ", this one knows " + std::to_string(kStoreVersion) + "; use that program, or another directory"};
}

Result<StoreFiles> ListStoreFiles(const std::string& path) {
  StoreFiles files;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(path, error)) {
    const std::string name = entry.path().filename().string();
    const bool table = IsTable(name), other = IsOther(name);
    struct stat info {};
    if (::lstat(entry.path().c_str(), &info) != 0) continue;  // a file that is gone is nobody's
    if (!table && !other) {
      files.foreign.push_back(name);
    } else if (S_ISLNK(info.st_mode)) {
      files.links.push_back(name);
    } else if (!S_ISREG(info.st_mode)) {
      files.foreign.push_back(name);
    } else {
      (table ? files.tables : files.others).push_back(name);
      files.bytes += static_cast<uint64_t>(info.st_size);
    }
  }
  if (error) return Io(path, "cannot list it", error.value());
  for (auto* names : {&files.tables, &files.others, &files.links, &files.foreign}) std::sort(names->begin(), names->end());
  return files;
}

Status CheckStoreFiles(const std::string& path) {
  PREHOC_ASSIGN_OR_RETURN(const StoreFiles files, ListStoreFiles(path));
  if (!files.links.empty()) {
    return {StatusCode::kInvalid, "store " + path + ": '" + files.links.front() +
                                      "' is a symbolic link, which no store makes; replace it by the file, or remove it"};
  }
  const auto half = [&](const std::string& what) {
    return Status(StatusCode::kCorrupt, "store " + path + ": holds half of a store: " + what +
                                            "; copy it whole while nobody writes to it, or delete the directory, it is a cache");
  };
  const auto has = [&](const std::string& name) { return std::binary_search(files.others.begin(), files.others.end(), name); };
  // RocksDB would begin anew over files that it then does not know.
  if (!has("CURRENT") && !files.tables.empty()) {
    return half("there are " + std::to_string(files.tables.size()) + " files of records and no 'CURRENT'");
  }
  const std::string manifest = has("CURRENT") ? FirstLineOf(path + "/CURRENT") : std::string();
  if (has("CURRENT") && !has(manifest)) return half("'CURRENT' names '" + manifest.substr(0, 40) + "', which is not there");
  return {};
}

Result<StoreNote> ReadStoreNote(const std::string& path) {
  const std::string name = path + "/" + kStoreNoteName;
  const int fd = ::open(name.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) {
    if (errno == ELOOP) {
      return {StatusCode::kInvalid, "store " + path + ": '" + kStoreNoteName + "' is a symbolic link, which no store makes; remove it"};
    }
    if (errno == ENOENT || errno == ENOTDIR) {
      return {StatusCode::kNotFound, "store " + path + ": is no store: there is no '" + kStoreNoteName + "' in it"};
    }
    return Io(path, "cannot read its note", errno);
  }
  char buffer[4096];  // longer than any note
  size_t size = 0;
  int error = 0;
  while (size < sizeof buffer) {
    const ssize_t n = ::read(fd, buffer + size, sizeof buffer - size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) error = errno;
    if (n <= 0) break;
    size += static_cast<size_t>(n);
  }
  ::close(fd);
  if (error != 0) return Io(path, "cannot read its note", error);
  Result<StoreNote> note = ParseStoreNote({buffer, size});
  if (!note.ok()) return note.status().WithContext("store " + path);
  return note;
}

Status CheckStoreNote(const StoreNote& found, const StoreNote& wanted) {
  const auto differs = [](const char* what, const std::string& was, const std::string& is) {
    return Status(StatusCode::kInvalid, std::string("was made for ") + what + " " + was + ", not " + is +
                                            "; use another directory, or delete this one");
  };
  if (found.store_version != wanted.store_version) {
    return differs("store version", std::to_string(found.store_version), std::to_string(wanted.store_version));
  }
  if (found.identity.format_version != wanted.identity.format_version) {
    return differs("format version", std::to_string(found.identity.format_version),
                   std::to_string(wanted.identity.format_version));
  }
  if (found.identity.dtype != OneLine(wanted.identity.dtype)) {
    return differs("dtype", found.identity.dtype, wanted.identity.dtype);
  }
  if (found.identity.layout != OneLine(wanted.identity.layout)) {
    return differs("layout", found.identity.layout, wanted.identity.layout);
  }
  if (found.identity.model != wanted.identity.model) {
    const auto name = [](const StoreIdentity& identity) {
      return "'" + identity.model_name + "' (" + Hex(identity.model).substr(0, 16) + ")";
    };
    return differs("model", name(found.identity), name(wanted.identity));
  }
  if (found.chunk_bytes != wanted.chunk_bytes) {
    return differs("chunk_bytes", std::to_string(found.chunk_bytes), std::to_string(wanted.chunk_bytes));
  }
  return {};
}

Status PrepareStoreDirectory(const std::string& path, const StoreNote& wanted, bool create_if_missing, bool read_only) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) {
    if (errno != ENOENT) return Io(path, "cannot look at it", errno);
    if (!create_if_missing || read_only) {
      return {StatusCode::kNotFound, "store " + path + ": no such directory"};
    }
    PREHOC_RETURN_IF_ERROR(MakeDirectories(path));
  } else if (!S_ISDIR(info.st_mode)) {
    return {StatusCode::kInvalid, "store " + path + ": is not a directory"};
  }
  const Result<StoreNote> found = ReadStoreNote(path);
  if (!found.ok() && found.status().code() != StatusCode::kNotFound) return found.status();
  if (found.ok()) {
    PREHOC_RETURN_IF_ERROR(CheckStoreNote(*found, wanted).WithContext("store " + path));
    PREHOC_RETURN_IF_ERROR(CheckStoreFiles(path));
    if (!read_only && ::access(path.c_str(), W_OK) != 0) {
      return {StatusCode::kIoError,
              "store " + path + ": is not writable (" + std::strerror(errno) + "); open it with read_only"};
    }
    return {};
  }
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(path, error)) {
    const std::string name = entry.path().filename().string();
    if (name == std::string(kStoreNoteName) + ".tmp") continue;  // a crash while the note was written
    return {StatusCode::kInvalid, "store " + path + ": holds other files (such as '" + name + "') and no '" +
                                      kStoreNoteName + "'; give an empty directory, or one that does not exist"};
  }
  if (error) return Io(path, "cannot list it", error.value());
  if (read_only || !create_if_missing) {
    return {StatusCode::kNotFound, "store " + path + ": is empty, there is nothing to open"};
  }
  if (::chmod(path.c_str(), 0700) != 0) return Io(path, "cannot take it for ourselves", errno);
  return WriteNote(path, FormatStoreNote(wanted));
}

std::string LockHolder(const std::string& path) {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  const int fd = ::open((path + "/LOCK").c_str(), O_RDONLY | O_CLOEXEC);
  const bool asked = fd >= 0 && ::fcntl(fd, F_GETLK, &lock) == 0;
  if (fd >= 0) ::close(fd);
  if (!asked || lock.l_type == F_UNLCK || lock.l_pid <= 0) return "another process";
  std::string name;
  std::getline(std::ifstream("/proc/" + std::to_string(lock.l_pid) + "/comm"), name);
  return "process " + std::to_string(lock.l_pid) + (name.empty() ? "" : " (" + name + ")");
}

void RestrictFiles(const std::string& path) {
  const auto files = ListStoreFiles(path);
  if (!files.ok()) return;
  for (const auto* names : {&files->tables, &files->others}) {
    for (const std::string& name : *names) {
      // Not by opening them: closing LOCK would give RocksDB's lock of it back.
      ::fchmodat(AT_FDCWD, (path + "/" + name).c_str(), 0600, AT_SYMLINK_NOFOLLOW);
    }
  }
}

}  // namespace prehoc
