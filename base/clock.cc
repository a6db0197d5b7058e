#include "base/clock.h"

namespace prehoc {
const SteadyClock& SteadyClock::Get() {
  static const SteadyClock clock;
  return clock;
}
}  // namespace prehoc
