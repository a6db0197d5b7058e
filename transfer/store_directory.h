// The directory of a disk store: who may read it, and the note in it that says what it was made for.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "transfer/chunk_store.h"

namespace prehoc {

inline constexpr char kStoreNoteName[] = "prehoc-store";
inline constexpr int kStoreVersion = 1;  // key schema and file properties; see docs/formats.md

struct StoreNote {
  int store_version = kStoreVersion;
  StoreIdentity identity;
  size_t chunk_bytes = 0;
};
std::string FormatStoreNote(const StoreNote& note);
// kCorrupt for anything that FormatStoreNote() would not write.
Result<StoreNote> ParseStoreNote(std::string_view text);
// OK if `found` may be opened as `wanted`; otherwise kInvalid with both values.
Status CheckStoreNote(const StoreNote& found, const StoreNote& wanted);

// The note of the store at `path`. kNotFound (no directory, or no note in it), kCorrupt, kUnsupported (a newer version wrote
// it; both are named), kInvalid (the note is a symbolic link), kIoError.
Result<StoreNote> ReadStoreNote(const std::string& path);

// What lies in the directory of a store, by name, sorted.
struct StoreFiles {
  std::vector<std::string> tables;   // RocksDB's files of records
  std::vector<std::string> others;   // its other files, and the note
  std::vector<std::string> links;    // symbolic links under a name of ours: never followed
  std::vector<std::string> foreign;  // names that no store has: never touched
  uint64_t bytes = 0;                // of tables and others
};
Result<StoreFiles> ListStoreFiles(const std::string& path);

// kInvalid if a file of ours is a symbolic link, kCorrupt if the directory holds half of a store (files that belong together
// were not copied together); both name the file.
Status CheckStoreFiles(const std::string& path);

// Makes `path` ready: creates it (0700) and its note (0600), or checks the note that is there. Writes nothing if
// `read_only`. Codes as RocksDbStore::Open().
Status PrepareStoreDirectory(const std::string& path, const StoreNote& wanted, bool create_if_missing, bool read_only);

// Who holds RocksDB's lock of the store at `path`: "process 4711 (prehoc)", or "another process" where that is unknown.
std::string LockHolder(const std::string& path);

// Takes access from group and others, for the store's own files; links are not followed. Best effort: 0700 on the directory holds anyway.
void RestrictFiles(const std::string& path);

}  // namespace prehoc
