// Result<T>: a value or the Status that says why there is none.
#pragma once
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/status.h"

namespace prehoc {

template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Status status) : status_(std::move(status)) { PREHOC_CHECK(!status_.ok()); }
  Result(StatusCode code, std::string message) : status_(code, std::move(message)) {}

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }  // OK exactly when a value is held

  // Require ok().
  T& value() & { return Checked(*this); }
  const T& value() const& { return Checked(*this); }
  T&& value() && { return std::move(Checked(*this)); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }

 private:
  template <class Self>
  static auto& Checked(Self& self) {
    PREHOC_CHECK(self.value_.has_value());
    return *self.value_;
  }
  Status status_;
  std::optional<T> value_;
};

#define PREHOC_CONCAT_INNER(a, b) a##b
#define PREHOC_CONCAT(a, b) PREHOC_CONCAT_INNER(a, b)
#define PREHOC_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr)             \
  auto tmp = (expr);                                             \
  if (!tmp.ok()) [[unlikely]] return std::move(tmp).status();    \
  lhs = std::move(tmp).value()
// PREHOC_ASSIGN_OR_RETURN(auto file, Open(path));
#define PREHOC_ASSIGN_OR_RETURN(lhs, expr) \
  PREHOC_ASSIGN_OR_RETURN_IMPL(PREHOC_CONCAT(prehoc_result_, __LINE__), lhs, expr)

}  // namespace prehoc
