// Random data of a test: its seed is part of every failure message while it lives.
#pragma once
#include <gtest/gtest.h>

#include <string>

#include "base/rng.h"

namespace prehoc {

// The seed is 1, or what --gtest_random_seed says, so that a failure can be repeated and a long run can vary it.
class SeededRng : public Rng {
 public:
  // The place is the caller's; std::source_location is more than clang 14 has.
  explicit SeededRng(uint64_t salt = 0, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : SeededRng(FlagSeed(), salt, file, line) {}

 private:
  SeededRng(uint64_t seed, uint64_t salt, const char* file, int line)
      : Rng(seed * 0x9e3779b97f4a7c15u + salt),
        trace_(file, line,
               "random data: --gtest_random_seed=" + std::to_string(seed) + ", salt " + std::to_string(salt)) {}
  static uint64_t FlagSeed() {
    const int flag = GTEST_FLAG_GET(random_seed);
    return flag == 0 ? 1 : static_cast<uint64_t>(flag);
  }
  testing::ScopedTrace trace_;
};

}  // namespace prehoc
