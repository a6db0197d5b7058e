// How fast engines move pieces of a size, and which of two is to move them.
#pragma once
#include <cstddef>
#include <span>
#include <vector>

#include "base/clock.h"
#include "transfer/transfer_engine.h"

namespace prehoc {

// [bytes/s] of the fastest of a few rounds. The first one warms up: pages, clocks, lists. `pieces` are copied by each. Errors are the engine's.
Result<double> MeasureRate(TransferEngine& engine, const std::vector<TransferPiece>& pieces, const Clock& clock);

struct PieceRate {
  size_t piece_bytes = 0;
  double few = 0, many = 0;  // [bytes/s] of the engine for large pieces, and of the one for many small ones
};
// Both engines over pieces of each of `sizes`, which lie in no order all over `from` and fill `to`; the spans are of one size, which holds two pieces
// of every size at least (kInvalid).
Result<std::vector<PieceRate>> MeasurePieces(TransferEngine& few, TransferEngine& many, std::span<std::byte> from, std::span<std::byte> to,
                                             std::span<const size_t> sizes, const Clock& clock);

// The least measured size from which on `few` is nearly as fast (19 of 20) or faster at every size: where neither is, the one that takes no
// multiprocessor is better. SIZE_MAX: nowhere.
size_t FewFrom(std::span<const PieceRate> rates);

}  // namespace prehoc
