#include "integrations/cli/versions.h"

#include <gnu/libc-version.h>
#include <openssl/crypto.h>
#include <rocksdb/version.h>
#include <xxhash.h>

#include <CLI/Version.hpp>
#include <fmt/core.h>
#include <nlohmann/json.hpp>

namespace prehoc::cli {
namespace {

std::string Decimal(int version, int step) {
  return fmt::format("{}.{}.{}", version / (step * step), version / step % step, version % step);
}

}  // namespace

std::vector<std::pair<std::string, std::string>> LibraryVersions() {
  return {
      {"RocksDB", ROCKSDB_NAMESPACE::GetRocksVersionAsString()},
      {"OpenSSL", OpenSSL_version(OPENSSL_VERSION_STRING)},
      {"xxHash", Decimal(static_cast<int>(XXH_versionNumber()), 100)},
      {"fmt", Decimal(FMT_VERSION, 100)},
      {"nlohmann-json", fmt::format("{}.{}.{}", NLOHMANN_JSON_VERSION_MAJOR, NLOHMANN_JSON_VERSION_MINOR, NLOHMANN_JSON_VERSION_PATCH)},
      {"CLI11", CLI11_VERSION},
      {"glibc", gnu_get_libc_version()},
      {"compiler", __VERSION__},
  };
}

}  // namespace prehoc::cli
