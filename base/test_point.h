// Named points where a test may act: fail a call, order threads. Nothing at all in release builds.
#pragma once

#ifdef PREHOC_TEST_POINTS
#include <functional>
#include <string>
#include <string_view>

namespace prehoc {
// Owned by a fixture: `hook` runs at every passage of the point `name` until this dies, which waits for hooks that run.
// One hook a name; the later one wins.
class TestPointHook {
 public:
  TestPointHook(std::string name, std::function<void()> hook);
  ~TestPointHook();
  TestPointHook(const TestPointHook&) = delete;
  TestPointHook& operator=(const TestPointHook&) = delete;

 private:
  std::string name_;
};
void PassTestPoint(std::string_view name);
}  // namespace prehoc
#define PREHOC_TEST_POINT(name) ::prehoc::PassTestPoint(name)
#else
#define PREHOC_TEST_POINT(name) static_cast<void>(0)
#endif
