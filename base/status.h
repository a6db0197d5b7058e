// Status: the outcome of anything that may fail. Small when OK, a code and a sentence otherwise.
#pragma once
#include <memory>
#include <new>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>

namespace prehoc {

// A closed list: callers may switch over it.
enum class StatusCode : unsigned char {
  kOk = 0,
  kNotFound,     // no such key, file or row
  kBusy,         // all of a bounded resource is in use right now; trying again may work
  kStale,        // the world changed since the plan was made
  kDeadline,     // it took longer than allowed
  kOutOfSpace,   // a budget, quota or disk is full
  kIoError,      // the operating system or a store refused
  kCorrupt,      // bytes are not what was written
  kCuda,         // a CUDA call failed
  kInvalid,      // the request or the configuration makes no sense
  kUnsupported,  // makes sense, but is not offered here
};

// "not found", "busy", ... for messages.
std::string_view StatusCodeName(StatusCode code);

// An error names the thing, what was wrong, and what to do, in one line.
class [[nodiscard]] Status {
 public:
  Status() = default;
  // Requires code != kOk. Where the system has no memory for the words, the code alone is kept, with "out of memory".
  Status(StatusCode code, std::string message) noexcept;

  bool ok() const { return rep_ == nullptr; }
  StatusCode code() const { return rep_ ? rep_->code : StatusCode::kOk; }
  const std::string& message() const;  // empty when ok()
  std::string ToString() const;        // "corrupt: chunk 12: checksum ..."

  // The same code with `context: ` before the message; OK stays OK.
  Status WithContext(std::string_view context) const;

  // Drops a status on purpose; a search for this name finds every such place and its reason.
  void IgnoreError() const {}

 private:
  struct Rep {
    StatusCode code;
    std::string message;
  };
  struct Prepared;
  std::shared_ptr<const Rep> rep_;  // null = OK
};

inline Status OkStatus() { return {}; }
// kOutOfSpace, "out of memory"; takes none.
Status OutOfMemory() noexcept;

// What `fn` returns, or OutOfMemory() where it (or what it calls) got no memory from the system: the way from std::bad_alloc to a
// Status. For functions that return a Status or a Result and leave everything as it was, or as their contract says, if they throw.
template <class Fn>
auto WithinMemory(Fn&& fn) noexcept -> decltype(fn()) {
  try {
    return fn();
  } catch (const std::bad_alloc&) {
    return OutOfMemory();
  }
}
// As WithinMemory(), but for words alone: what it is without them is `code`.
template <class Fn>
Status WithWords(StatusCode code, Fn&& fn) noexcept {
  try {
    return fn();
  } catch (const std::bad_alloc&) {
    return {code, {}};
  }
}
std::ostream& operator<<(std::ostream& os, const Status& status);

#define PREHOC_RETURN_IF_ERROR(expr)                        \
  do {                                                      \
    ::prehoc::Status prehoc_status_ = (expr);               \
    if (!prehoc_status_.ok()) [[unlikely]] return prehoc_status_; \
  } while (false)

}  // namespace prehoc
