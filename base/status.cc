#include "base/status.h"

#include <array>

#include "base/check.h"

namespace prehoc {

std::string_view StatusCodeName(StatusCode code) {
  switch (code) {
    case StatusCode::kOk: return "ok";
    case StatusCode::kNotFound: return "not found";
    case StatusCode::kBusy: return "busy";
    case StatusCode::kStale: return "stale";
    case StatusCode::kDeadline: return "deadline";
    case StatusCode::kOutOfSpace: return "out of space";
    case StatusCode::kIoError: return "I/O error";
    case StatusCode::kCorrupt: return "corrupt";
    case StatusCode::kCuda: return "CUDA error";
    case StatusCode::kInvalid: return "invalid";
    case StatusCode::kUnsupported: return "unsupported";
  }
  return "unknown";
}

// What is said without memory is made when there still is some.
struct Status::Prepared {
  std::array<std::shared_ptr<const Rep>, static_cast<size_t>(StatusCode::kUnsupported) + 1> reps;
  Prepared() {
    for (size_t i = 0; i < reps.size(); ++i) reps[i] = std::make_shared<const Rep>(Rep{static_cast<StatusCode>(i), "out of memory"});
  }
  static const Prepared& Get() {
    static const Prepared prepared;
    return prepared;
  }
};
namespace {
[[maybe_unused]] const Status kFirst = OutOfMemory();  // before main()
}

Status::Status(StatusCode code, std::string message) noexcept {
  PREHOC_CHECK(code != StatusCode::kOk);
  if (!message.empty()) {
    try {
      rep_ = std::make_shared<const Rep>(Rep{code, std::move(message)});
    } catch (const std::bad_alloc&) {
    }
  }
  if (rep_ == nullptr) rep_ = Prepared::Get().reps[static_cast<size_t>(code)];
}

Status OutOfMemory() noexcept { return {StatusCode::kOutOfSpace, {}}; }

const std::string& Status::message() const {
  static const std::string kEmpty;
  return rep_ ? rep_->message : kEmpty;
}

std::string Status::ToString() const {
  if (ok()) return "ok";
  return std::string(StatusCodeName(code())) + ": " + message();
}

Status Status::WithContext(std::string_view context) const {
  if (ok()) return {};
  return {code(), std::string(context) + ": " + message()};
}

std::ostream& operator<<(std::ostream& os, const Status& status) { return os << status.ToString(); }

}  // namespace prehoc
