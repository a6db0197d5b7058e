// Which faults happen when, all from one seed, and what became of each.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/mutex.h"
#include "base/result.h"
#include "base/rng.h"

namespace prehoc::torture {

enum class Fault : uint8_t {
  // What a medium gives back.
  kFlip, kTorn, kShort, kStale, kSwapped, kWrongKey, kReadError, kDelay,
  // What it does with what it is given.
  kWriteFlip, kWriteTorn, kLost, kWriteError,
  // Everything else.
  kMemory, kCopyError, kCopyHalf, kJobRefused, kJobLate, kDevice, kClock,
  kCount
};
inline constexpr size_t kFaults = static_cast<size_t>(Fault::kCount);

struct FaultInfo {
  std::string_view name;  // as --faults takes it
  std::string_view what;  // for people
  bool bytes;             // makes wrong bytes of right ones: must be detected, or never be read
};
const FaultInfo& InfoOf(Fault fault);

using FaultSet = std::array<bool, kFaults>;
// "all", "none", or names with commas between. kInvalid names what is unknown and what there is.
Result<FaultSet> ParseFaults(std::string_view text);

// Safe from any thread. With one thread the n-th question always has the same answer.
class FaultPlan {
 public:
  FaultPlan(const FaultSet& enabled, uint64_t seed) : enabled_(enabled), random_(seed) {}

  // True with this probability, if the fault is enabled and the plan is not paused. Counts nothing yet.
  bool Draw(Fault fault, double probability);
  uint64_t Next();              // a random number
  void Pause(bool paused);

  struct Count {
    uint64_t injected = 0;   // changed or delayed something
    uint64_t detected = 0;   // by a check, before the bytes were used
    uint64_t unread = 0;     // went with their bytes before anybody asked for them
    uint64_t missed = 0;     // wrong bytes that passed a check
  };
  void Injected(Fault fault) { Add(fault, &Count::injected, 1); }
  void Detected(Fault fault) { Add(fault, &Count::detected, 1); }
  void Unread(Fault fault, uint64_t n = 1) { Add(fault, &Count::unread, n); }
  void Missed(Fault fault) { Add(fault, &Count::missed, 1); }
  Count Of(Fault fault) const;
  uint64_t digest() const;      // of all questions and answers so far

 private:
  void Add(Fault fault, uint64_t Count::*field, uint64_t n);

  const FaultSet enabled_;
  mutable Mutex mutex_;
  Rng random_ PREHOC_GUARDED_BY(mutex_);
  bool paused_ PREHOC_GUARDED_BY(mutex_) = false;
  uint64_t digest_ PREHOC_GUARDED_BY(mutex_) = 0;
  std::array<Count, kFaults> counts_ PREHOC_GUARDED_BY(mutex_);
};

}  // namespace prehoc::torture
