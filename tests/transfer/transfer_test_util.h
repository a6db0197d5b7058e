// What the tests of transfer/ share: directories that clean up after themselves, and an identity.
#pragma once
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "transfer/chunk_store.h"

#define ASSERT_STATUS_OK(expr)                       \
  do {                                               \
    const ::prehoc::Status status_ = (expr);         \
    ASSERT_TRUE(status_.ok()) << status_.ToString(); \
  } while (false)
#define EXPECT_STATUS_OK(expr)                       \
  do {                                               \
    const ::prehoc::Status status_ = (expr);         \
    EXPECT_TRUE(status_.ok()) << status_.ToString(); \
  } while (false)
// The code, and a part of the message.
#define EXPECT_STATUS(expr, expected_code, part)                                           \
  do {                                                                                     \
    const ::prehoc::Status status_ = (expr);                                               \
    EXPECT_EQ(status_.code(), expected_code) << status_.ToString();                        \
    EXPECT_NE(status_.ToString().find(part), std::string::npos) << status_.ToString();     \
  } while (false)

namespace prehoc {

class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "prehoc-test-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) std::abort();
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline StoreIdentity TestIdentity() {
  StoreIdentity identity;
  for (size_t i = 0; i < identity.model.size(); ++i) identity.model[i] = static_cast<uint8_t>(i * 7 + 1);
  identity.model_name = "test-model";
  identity.layout = "rows-kv/l2/h2/d16/p16/c64";
  return identity;
}

}  // namespace prehoc
