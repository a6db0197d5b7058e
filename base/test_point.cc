#include "base/test_point.h"

#ifdef PREHOC_TEST_POINTS
#include <map>

#include "base/mutex.h"

namespace prehoc {
namespace {
struct Registry {
  Mutex mutex;
  std::map<std::string, std::function<void()>, std::less<>> hooks PREHOC_GUARDED_BY(mutex);
};
Registry& TheRegistry() {
  static Registry registry;
  return registry;
}
}  // namespace

TestPointHook::TestPointHook(std::string name, std::function<void()> hook) : name_(std::move(name)) {
  MutexLock lock(TheRegistry().mutex);
  TheRegistry().hooks[name_] = std::move(hook);
}

TestPointHook::~TestPointHook() {
  MutexLock lock(TheRegistry().mutex);
  TheRegistry().hooks.erase(name_);
}

void PassTestPoint(std::string_view name) {
  std::function<void()> hook;
  {
    MutexLock lock(TheRegistry().mutex);
    const auto it = TheRegistry().hooks.find(name);
    if (it == TheRegistry().hooks.end()) return;
    hook = it->second;
  }
  hook();
}

}  // namespace prehoc
#endif
