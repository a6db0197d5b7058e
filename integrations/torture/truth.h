// What is true in a run of torture: K, V and queries made up from a seed, the bytes of every block they make, and what attention
// over them gives where nothing fails.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/mutex.h"
#include "cache/kv_cache.h"
#include "integrations/torture/fault_plan.h"
#include "transfer/chunk_store.h"

namespace prehoc::torture {

inline constexpr int64_t kStreams = 3;
inline constexpr std::array<int64_t, 4> kPrompts = {65, 128, 200, 256};  // tokens; prompts of one stream begin alike
inline constexpr int64_t kMaxSteps = 12;                                 // decode steps of one sequence
inline constexpr int64_t kMaxTokens = kPrompts.back() + kMaxSteps;

KvGeometry TortureGeometry(RowFormat rows = RowFormat::kF16);

// One endless text, as far as it is needed.
class Stream {
 public:
  explicit Stream(uint64_t seed);
  std::span<const int32_t> tokens(int64_t first, int64_t count) const {
    return std::span(tokens_).subspan(static_cast<size_t>(first), static_cast<size_t>(count));
  }
  // The input of `layer` for tokens from `first` on.
  LayerInput Input(int32_t layer, int64_t first, float* out) const;
  // The bytes of one block of rows of a format.
  std::vector<std::byte> Block(int64_t chunk, int32_t layer, RowFormat rows = RowFormat::kF16) const;

 private:
  std::vector<int32_t> tokens_;
  std::vector<std::vector<float>> q_, k_, v_;  // [layers][tokens * width]
};

// Runs tokens [sequence.length(), + count) through all layers; `out` [layers][count * heads * head_dim].
using Outputs = std::vector<std::vector<float>>;
Status RunTokens(Sequence& sequence, const Stream& stream, int64_t count, int64_t prompt, Outputs* out);
// Makes chunks anew that no tier has any more.
Status RepairLost(Sequence& sequence, const Stream& stream, uint64_t* repaired);

class Truth {
 public:
  explicit Truth(uint64_t seed, RowFormat rows = RowFormat::kF16);
  const KvGeometry& geometry() const { return geometry_; }
  const Stream& stream(int64_t i) const { return streams_[static_cast<size_t>(i)]; }

  // Runs every prompt once in a cache that holds all of it in memory, unless this selector was prepared before; what is compared
  // is compared with this one from here on. Not for two threads at once.
  Status Prepare(const SelectorOptions& selector);

  // Outputs of prompt tokens [first, first + count) of a stream, and of the decode step after `prompt` tokens, against what
  // they are without faults. True if they are the same to rounding.
  bool PrefillIsRight(int64_t stream, int64_t first, int64_t count, const Outputs& outputs) const;
  bool StepIsRight(int64_t stream, int64_t prompt, int64_t step, const Outputs& outputs) const;

  // True if some stream has a block with these bytes at this place.
  bool BlockIsRight(int64_t chunk, int32_t layer, std::span<const std::byte> bytes) const;

 private:
  const KvGeometry geometry_;
  std::vector<Stream> streams_;
  std::map<std::pair<int64_t, int32_t>, std::vector<std::array<uint64_t, 2>>> blocks_;  // hashes by (chunk, layer)
  struct Answers {
    std::vector<Outputs> prefill;                                        // [streams]
    std::map<std::pair<int64_t, int64_t>, std::vector<Outputs>> decode;  // (stream, prompt) -> [steps]
  };
  std::map<SelectorKind, Answers> answers_;
  const Answers* now_ = nullptr;
};

// Compares every block that passes with the truth, in both directions, and lets writes fail on purpose.
class TruthStore final : public ChunkStoreWrapper {
 public:
  TruthStore(ChunkStore* base, const Truth* truth, FaultPlan* plan, double rate)
      : ChunkStoreWrapper(base), truth_(truth), plan_(plan), rate_(rate) {}
  uint64_t reads() const { return reads_; }    // compared
  uint64_t writes() const { return writes_; }
  std::vector<std::string> TakeWrong();        // what was not as it should be
  // Keys whose bytes were known in another store over the same directory.
  using Known = std::unordered_map<ChunkKey, std::array<uint64_t, 2>, ChunkKeyHash>;
  Known TakeKnown();
  void GiveKnown(Known known);

 private:
  Status DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) override;
  Status DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) override;
  Status DoReplace(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) override;
  Status NoteWrite(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin);

  const Truth* const truth_;
  FaultPlan* const plan_;
  const double rate_;
  std::atomic<uint64_t> reads_{0}, writes_{0};
  Mutex mutex_;
  Known known_ PREHOC_GUARDED_BY(mutex_);
  std::vector<std::string> wrong_ PREHOC_GUARDED_BY(mutex_);
};

}  // namespace prehoc::torture
