// The one source of random data in tests, benchmarks and the fault harness: the same numbers from the same seed on every machine
// and library (the distributions of <random> are not). tests/support/seeded_rng.h adds the seed to every failure.
#pragma once
#include <cmath>
#include <cstdint>
#include <numbers>
#include <utility>
#include <vector>

namespace prehoc {

// SplitMix64 (Steele, Lea, Flood 2014): any seed is a good one. One thread at a time; Fork() gives another thread its own.
class Rng {
 public:
  explicit Rng(uint64_t seed) : state_(seed) {}

  uint64_t Next() {
    state_ += 0x9e3779b97f4a7c15u;
    uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  uint64_t Below(uint64_t bound) { return Next() % bound; }  // bound > 0, far below 2^64
  Rng Fork() { return Rng(Next()); }

  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }  // [0, 1)
  double Uniform(double lo, double hi) { return lo + (hi - lo) * Uniform(); }
  int64_t Int(int64_t lo, int64_t hi) {  // [lo, hi], both included; hi - lo < 2^53
    return lo + static_cast<int64_t>(Uniform() * static_cast<double>(hi - lo + 1));
  }
  bool Chance(double probability) { return Uniform() < probability; }
  double Normal() {  // Box and Muller; the second number is thrown away
    const double radius = std::sqrt(-2 * std::log(1 - Uniform()));
    return radius * std::cos(2 * std::numbers::pi * Uniform());
  }
  double HeavyTailed() { return Normal() / std::sqrt(-std::log(1 - Uniform())); }  // Student's t, 2 degrees of freedom

  std::vector<float> Normals(size_t count, double scale = 1) {
    std::vector<float> values(count);
    for (float& value : values) value = static_cast<float>(scale * Normal());
    return values;
  }
  template <class T>
  void Shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) {
      std::swap(values[i - 1], values[static_cast<size_t>(Int(0, static_cast<int64_t>(i) - 1))]);
    }
  }
  template <class T>
  const T& Pick(const std::vector<T>& values) {  // requires at least one
    return values[static_cast<size_t>(Int(0, static_cast<int64_t>(values.size()) - 1))];
  }

 private:
  uint64_t state_;
};

}  // namespace prehoc
