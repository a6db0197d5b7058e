// The movement seam: batches of copies with a life of their own: prepare, post, poll, release.
#pragma once
#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/counters.h"
#include "base/result.h"

namespace prehoc {

// One copy. The memory of both sides outlives the request, or stays untouched from Post() until it is done.
struct TransferPiece {
  const std::byte* src = nullptr;
  std::byte* dst = nullptr;
  size_t bytes = 0;  // may be 0
};

class TransferEngine;

// A batch that owns its descriptors; its pieces complete together. Moves, does not copy, empty once moved from.
//
//   prepared --Post()--> posted --(the engine finishes)--> done (OK or failed) --Post()--> posted ...
//
// Not for two threads at once; which thread uses it may change. Dies in any state: a posted one waits first, so
// that no copy runs into memory that its owner has let go.
class [[nodiscard]] TransferRequest {
 public:
  TransferRequest();
  TransferRequest(TransferRequest&& other) noexcept;
  TransferRequest& operator=(TransferRequest&& other) noexcept;
  ~TransferRequest();

  // Starts the copies and returns without waiting for them. From `prepared` and from `done`.
  // Returns kBusy if it is posted already, kInvalid if it is empty, or what the engine says; then it stays as it was.
  Status Post();

  // kBusy while posted; OK or the error once done (again at each call); kInvalid before Post(). Never waits.
  // After an error the bytes of every dst are unspecified: half a batch may have been copied.
  Status Poll();

  // As Poll(), but waits until done.
  Status Wait();

  std::span<const TransferPiece> pieces() const { return pieces_; }
  size_t bytes() const { return bytes_; }

 private:
  friend class TransferEngine;
  struct Work;
  enum class State : unsigned char { kEmpty, kPrepared, kPosted, kDone };
  void Release();

  TransferEngine* engine_ = nullptr;
  std::vector<TransferPiece> pieces_;
  size_t bytes_ = 0;
  State state_ = State::kEmpty;
  std::unique_ptr<Work> work_;
  Status result_;
};

// Safe from any thread. Outlives its requests. Requests have no order among each other.
class TransferEngine {
 public:
  virtual ~TransferEngine() = default;

  // Checks and takes over `pieces`. Returns kInvalid (null pointer with bytes > 0, sizes that overflow, a dst that
  // overlaps its own src).
  Result<TransferRequest> Prepare(std::vector<TransferPiece> pieces);

  // transfer.{requests,failed,pieces,bytes,inline}
  void VisitCounters(const CounterVisitor& visit) const { DoVisitCounters(visit); }

 protected:
  // Copies under way. Destroyed only after Poll() or Wait() has said something else than kBusy.
  class Operation {
   public:
    virtual ~Operation() = default;
    virtual Status Poll() = 0;  // kBusy while running
    virtual Status Wait() = 0;  // never kBusy
  };

 private:
  friend class TransferRequest;
  friend struct TransferRequest::Work;
  // `pieces` stay where they are until the operation is done.
  virtual Result<std::unique_ptr<Operation>> DoPost(std::span<const TransferPiece> pieces) = 0;
  virtual void DoVisitCounters(const CounterVisitor& visit) const = 0;
};

}  // namespace prehoc
