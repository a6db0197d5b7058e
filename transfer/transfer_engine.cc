#include "transfer/transfer_engine.h"

#include <cstdint>
#include <string>

namespace prehoc {

struct TransferRequest::Work {
  std::unique_ptr<TransferEngine::Operation> operation;
};

TransferRequest::TransferRequest() = default;

TransferRequest::TransferRequest(TransferRequest&& other) noexcept { *this = std::move(other); }

TransferRequest& TransferRequest::operator=(TransferRequest&& other) noexcept {
  if (this != &other) {
    Release();
    engine_ = std::exchange(other.engine_, nullptr);
    pieces_ = std::move(other.pieces_);  // the array itself moves along, so running copies keep their descriptors
    other.pieces_.clear();
    bytes_ = std::exchange(other.bytes_, 0);
    state_ = std::exchange(other.state_, State::kEmpty);
    work_ = std::move(other.work_);
    result_ = std::exchange(other.result_, Status());
  }
  return *this;
}

TransferRequest::~TransferRequest() { Release(); }

void TransferRequest::Release() {
  // Nobody is left to hear of a failure.
  if (state_ == State::kPosted) Wait().IgnoreError();
  work_.reset();
  state_ = State::kEmpty;
}

Status TransferRequest::Post() {
  if (state_ == State::kEmpty) return {StatusCode::kInvalid, "transfer: Post() on an empty request"};
  if (state_ == State::kPosted && Poll().code() == StatusCode::kBusy) {
    return {StatusCode::kBusy, "transfer: the request is still under way"};
  }
  auto work = std::make_unique<Work>();  // before anything runs that nobody could wait for
  auto operation = engine_->DoPost(pieces_);
  if (!operation.ok()) return operation.status();
  work_ = std::move(work);
  work_->operation = std::move(*operation);
  state_ = State::kPosted;
  return {};
}

Status TransferRequest::Poll() {
  if (state_ == State::kPosted) {
    Status status = work_->operation->Poll();
    if (status.code() == StatusCode::kBusy) return status;
    result_ = std::move(status);
    work_.reset();
    state_ = State::kDone;
  }
  if (state_ != State::kDone) return {StatusCode::kInvalid, "transfer: the request was never posted"};
  return result_;
}

Status TransferRequest::Wait() {
  if (state_ == State::kPosted) {
    result_ = work_->operation->Wait();
    work_.reset();
    state_ = State::kDone;
  }
  return Poll();
}

Result<TransferRequest> TransferEngine::Prepare(std::vector<TransferPiece> pieces) {
  size_t total = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const TransferPiece& piece = pieces[i];
    const auto bad = [&](const char* why) {
      return Status(StatusCode::kInvalid, "transfer: piece " + std::to_string(i) + " of " +
                                              std::to_string(piece.bytes) + " bytes " + why);
    };
    if (piece.bytes == 0) continue;
    if (piece.src == nullptr || piece.dst == nullptr) return bad("has a null pointer");
    const auto src = reinterpret_cast<uintptr_t>(piece.src);
    const auto dst = reinterpret_cast<uintptr_t>(piece.dst);
    if (piece.bytes > UINTPTR_MAX - src || piece.bytes > UINTPTR_MAX - dst || piece.bytes > SIZE_MAX - total) {
      return bad("overflows the address space");
    }
    if (src < dst + piece.bytes && dst < src + piece.bytes) return bad("overlaps itself");
    total += piece.bytes;
  }
  TransferRequest request;
  request.engine_ = this;
  request.pieces_ = std::move(pieces);
  request.bytes_ = total;
  request.state_ = TransferRequest::State::kPrepared;
  return request;
}

}  // namespace prehoc
