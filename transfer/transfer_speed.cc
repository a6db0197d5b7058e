#include "transfer/transfer_speed.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "base/rng.h"

namespace prehoc {
namespace {
constexpr int kRounds = 3;
constexpr double kNearlyAsFast = 0.95;
}  // namespace

Result<double> MeasureRate(TransferEngine& engine, const std::vector<TransferPiece>& pieces, const Clock& clock) {
  PREHOC_ASSIGN_OR_RETURN(TransferRequest request, engine.Prepare(pieces));
  double best = 0;
  for (int i = 0; i < kRounds; ++i) {
    const int64_t start = clock.NowNanos();
    PREHOC_RETURN_IF_ERROR(request.Post());
    PREHOC_RETURN_IF_ERROR(request.Wait());
    const int64_t nanos = std::max<int64_t>(1, clock.NowNanos() - start);
    best = std::max(best, static_cast<double>(request.bytes()) * 1e9 / static_cast<double>(nanos));
  }
  return best;
}

Result<std::vector<PieceRate>> MeasurePieces(TransferEngine& few, TransferEngine& many, std::span<std::byte> from, std::span<std::byte> to,
                                             std::span<const size_t> sizes, const Clock& clock) {
  std::vector<PieceRate> rates;
  Rng rng(1);
  for (const size_t size : sizes) {
    if (size == 0 || from.size() != to.size() || from.size() / size < 2) {
      return {StatusCode::kInvalid, "pieces of " + std::to_string(size) + " bytes in spans of " + std::to_string(from.size()) + " and " +
                                        std::to_string(to.size()) + "; give spans of one size that hold two"};
    }
    std::vector<size_t> order(from.size() / size);
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    rng.Shuffle(order);
    std::vector<TransferPiece> pieces;
    for (size_t i = 0; i < order.size(); ++i) pieces.push_back({from.data() + order[i] * size, to.data() + i * size, size});
    PieceRate rate{.piece_bytes = size};
    PREHOC_ASSIGN_OR_RETURN(rate.few, MeasureRate(few, pieces, clock));
    PREHOC_ASSIGN_OR_RETURN(rate.many, MeasureRate(many, pieces, clock));
    rates.push_back(rate);
  }
  return rates;
}

size_t FewFrom(std::span<const PieceRate> rates) {
  std::vector<PieceRate> by_size(rates.begin(), rates.end());
  std::sort(by_size.begin(), by_size.end(), [](const PieceRate& a, const PieceRate& b) { return a.piece_bytes > b.piece_bytes; });
  size_t from = SIZE_MAX;
  for (const PieceRate& rate : by_size) {
    if (!(rate.few >= kNearlyAsFast * rate.many)) break;
    from = rate.piece_bytes;
  }
  return from;
}

}  // namespace prehoc
