#include "base/test_point.h"

#ifdef PREHOC_TEST_POINTS
#include <map>
#include <memory>

#include "base/mutex.h"

namespace prehoc {
namespace {
struct Hook {
  std::function<void()> run;
  int running = 0;  // guarded by the registry's mutex
};
struct Registry {
  Mutex mutex;
  CondVar ended;
  std::map<std::string, std::shared_ptr<Hook>, std::less<>> hooks PREHOC_GUARDED_BY(mutex);
};
Registry& TheRegistry() {
  static Registry registry;
  return registry;
}
}  // namespace

TestPointHook::TestPointHook(std::string name, std::function<void()> hook) : name_(std::move(name)) {
  Registry& registry = TheRegistry();
  MutexLock lock(registry.mutex);
  registry.hooks[name_] = std::make_shared<Hook>(Hook{std::move(hook)});
}

TestPointHook::~TestPointHook() {
  Registry& registry = TheRegistry();
  MutexLock lock(registry.mutex);
  const auto found = registry.hooks.find(name_);
  if (found == registry.hooks.end()) return;
  const std::shared_ptr<Hook> hook = found->second;
  registry.hooks.erase(found);
  while (hook->running > 0) registry.ended.Wait(registry.mutex);
}

void PassTestPoint(std::string_view name) {
  Registry& registry = TheRegistry();
  std::shared_ptr<Hook> hook;
  {
    MutexLock lock(registry.mutex);
    const auto found = registry.hooks.find(name);
    if (found == registry.hooks.end()) return;
    hook = found->second;
    ++hook->running;
  }
  hook->run();
  MutexLock lock(registry.mutex);
  if (--hook->running == 0) registry.ended.NotifyAll();
}

}  // namespace prehoc
#endif
