// What every fuzz target checks besides memory: an error is one printable line. libFuzzer runs the targets under clang
// (preset fuzz); elsewhere replay_main.cc runs them over the committed corpus.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>

#include "base/check.h"
#include "base/status.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace prehoc::fuzz {

inline std::string_view TextOf(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

inline void CheckStatus(const Status& status) {
  if (status.ok()) return;
  PREHOC_CHECK(!status.message().empty());
  for (const char c : status.message()) PREHOC_CHECK(c != '\n' && c != '\r' && c != '\0' && c != '\x1b');
}

// Reads every byte, so that a view past its buffer is seen.
inline unsigned Touch(std::span<const std::byte> bytes) {
  unsigned sum = 0;
  for (const std::byte b : bytes) sum += std::to_integer<unsigned>(b);
  return sum;
}

}  // namespace prehoc::fuzz
