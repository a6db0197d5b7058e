#include "integrations/torture/truth.h"

#include <algorithm>
#include <cmath>

#include "base/device_memory.h"
#include "base/executor.h"
#include "base/half.h"
#include "kernels/row_codec.h"
#include "transfer/record_format.h"

namespace prehoc::torture {
namespace {

size_t KvWidth(const KvGeometry& geometry) { return static_cast<size_t>(geometry.kv_heads * geometry.head_dim); }
size_t QWidth(const KvGeometry& geometry) { return static_cast<size_t>(geometry.heads * geometry.head_dim); }

// To rounding: sums may be taken in another order. A wrong byte of K or V shows as its own, in TruthStore.
bool Same(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) <= 2e-5f + 2e-5f * std::abs(b[i]))) return false;
  }
  return true;
}

}  // namespace

KvGeometry TortureGeometry(RowFormat rows) {
  KvGeometry geometry;
  geometry.rows = rows;
  geometry.layers = 2;
  geometry.heads = 4;
  geometry.kv_heads = 2;
  geometry.head_dim = 16;
  geometry.chunk_tokens = 32;
  return geometry;
}

Stream::Stream(uint64_t seed) {
  const KvGeometry geometry = TortureGeometry();
  Rng random(seed);
  for (int64_t t = 0; t < kMaxTokens; ++t) tokens_.push_back(static_cast<int32_t>(random.Below(1000)));
  for (int32_t l = 0; l < geometry.layers; ++l) {
    std::vector<float> q, k, v, current(QWidth(geometry));
    for (float& x : current) x = static_cast<float>(random.Normal());
    for (int64_t t = 0; t < kMaxTokens; ++t) {
      // Keys with heavy ones among them and queries that now and then jump, so that choices hold at some steps and not at others.
      const double scale = t == 0 ? 2.5 : (random.Uniform() < 0.1 ? 2 : 0.7);
      for (size_t i = 0; i < KvWidth(geometry); ++i) k.push_back(HalfToFloat(FloatToHalf(static_cast<float>(scale * random.Normal()))));
      for (size_t i = 0; i < KvWidth(geometry); ++i) v.push_back(HalfToFloat(FloatToHalf(static_cast<float>(random.Normal()))));
      const double turn = random.Uniform() < 0.2 ? 1.0 : 0.25;
      for (float& x : current) x = static_cast<float>(x * std::sqrt(1 - turn * turn) + turn * random.Normal());
      q.insert(q.end(), current.begin(), current.end());
    }
    q_.push_back(std::move(q));
    k_.push_back(std::move(k));
    v_.push_back(std::move(v));
  }
}

LayerInput Stream::Input(int32_t layer, int64_t first, float* out) const {
  const KvGeometry geometry = TortureGeometry();
  const auto l = static_cast<size_t>(layer);
  LayerInput input;
  input.q = input.q_pre_rope = q_[l].data() + static_cast<size_t>(first) * QWidth(geometry);
  input.k = k_[l].data() + static_cast<size_t>(first) * KvWidth(geometry);
  input.v = v_[l].data() + static_cast<size_t>(first) * KvWidth(geometry);
  input.out = out;
  return input;
}

std::vector<std::byte> Stream::Block(int64_t chunk, int32_t layer, RowFormat rows) const {
  const KvGeometry geometry = TortureGeometry(rows);
  std::vector<std::byte> bytes(geometry.block_bytes());
  std::byte* to = bytes.data();
  for (int32_t h = 0; h < geometry.kv_heads; ++h) {
    for (int64_t t = chunk * geometry.chunk_tokens; t < (chunk + 1) * geometry.chunk_tokens; ++t) {
      std::vector<Half> row;
      for (const auto* part : {&k_, &v_}) {
        const float* values = (*part)[static_cast<size_t>(layer)].data() + static_cast<size_t>(t) * KvWidth(geometry) +
                              static_cast<size_t>(h * geometry.head_dim);
        for (int32_t c = 0; c < geometry.head_dim; ++c) row.push_back(FloatToHalf(values[c]));
      }
      NarrowRow(row.data(), rows, geometry.head_dim, to);
      to += geometry.stored_row_bytes();
    }
  }
  return bytes;
}

Status RunTokens(Sequence& sequence, const Stream& stream, int64_t count, int64_t prompt, Outputs* out) {
  const KvGeometry geometry = TortureGeometry();
  const int64_t first = sequence.length();
  // Not what an earlier try has left there.
  out->assign(static_cast<size_t>(geometry.layers), std::vector<float>(static_cast<size_t>(count) * QWidth(geometry), -99.0f));
  PREHOC_RETURN_IF_ERROR(sequence.Begin(stream.tokens(first, count), prompt));
  Status status;
  for (int32_t l = 0; l < geometry.layers && status.ok(); ++l) {
    const LayerInput input = stream.Input(l, first, (*out)[static_cast<size_t>(l)].data());
    status = prompt == 0 ? sequence.Attend(LayerId(l), input) : sequence.Prefill(LayerId(l), input);
  }
  if (status.ok()) status = sequence.End();
  if (!status.ok()) sequence.Rollback();
  return status;
}

Status RepairLost(Sequence& sequence, const Stream& stream, uint64_t* repaired) {
  const KvGeometry geometry = TortureGeometry();
  std::vector<float> out(static_cast<size_t>(geometry.chunk_tokens) * QWidth(geometry));
  for (const ChunkIndex chunk : sequence.LostChunks()) {
    Status status = sequence.BeginRepair(chunk);
    for (int32_t l = 0; l < geometry.layers && status.ok(); ++l) {
      status = sequence.Prefill(LayerId(l), stream.Input(l, int64_t{chunk.value()} * geometry.chunk_tokens, out.data()));
    }
    if (status.ok()) status = sequence.EndRepair();
    if (!status.ok()) {
      sequence.Rollback();
      return status;
    }
    ++*repaired;
  }
  return {};
}

Truth::Truth(uint64_t seed, RowFormat rows) : geometry_(TortureGeometry(rows)) {
  Rng random(seed);
  for (int64_t s = 0; s < kStreams; ++s) {
    streams_.emplace_back(random.Next());
    for (int64_t chunk = 0; chunk < kMaxTokens / geometry_.chunk_tokens; ++chunk) {
      for (int32_t l = 0; l < geometry_.layers; ++l) blocks_[{chunk, l}].push_back(Hash128(streams_.back().Block(chunk, l, rows)));
    }
  }
}

Status Truth::Prepare(const SelectorOptions& selector) {
  const auto [entry, is_new] = answers_.try_emplace(selector.kind);
  Answers& answers = entry->second;
  now_ = &answers;
  if (!is_new) return {};
  ManualExecutor executor;
  HostDeviceMemory device(256 << 20);
  CacheOptions options;
  options.geometry = geometry_;
  options.host_budget = 16 << 20;
  options.huge_pages = false;
  options.audit_every = 0;
  options.selector = selector;
  options.codes.group_tokens = 16;
  CacheResources resources;
  resources.executor = &executor;
  resources.device = &device;
  answers.prefill.resize(kStreams);
  for (int64_t s = 0; s < kStreams; ++s) {
    for (const int64_t prompt : kPrompts) {
      PREHOC_ASSIGN_OR_RETURN(const auto cache, KvCache::Create(options, resources));
      PREHOC_ASSIGN_OR_RETURN(const auto sequence, cache->Open({.max_tokens = kMaxTokens}));
      Outputs outputs;
      PREHOC_RETURN_IF_ERROR(RunTokens(*sequence, stream(s), prompt, prompt, &outputs));
      if (prompt == kPrompts.back()) answers.prefill[static_cast<size_t>(s)] = outputs;
      for (int64_t step = 0; step < kMaxSteps; ++step) {
        PREHOC_RETURN_IF_ERROR(RunTokens(*sequence, stream(s), 1, 0, &outputs));
        answers.decode[{s, prompt}].push_back(outputs);
      }
    }
  }
  return {};
}

bool Truth::PrefillIsRight(int64_t stream, int64_t first, int64_t count, const Outputs& outputs) const {
  const KvGeometry geometry = TortureGeometry();
  for (int32_t l = 0; l < geometry.layers; ++l) {
    const std::span<const float> all = now_->prefill[static_cast<size_t>(stream)][static_cast<size_t>(l)];
    if (!Same(outputs[static_cast<size_t>(l)], all.subspan(static_cast<size_t>(first) * QWidth(geometry), static_cast<size_t>(count) * QWidth(geometry)))) {
      return false;
    }
  }
  return true;
}

bool Truth::StepIsRight(int64_t stream, int64_t prompt, int64_t step, const Outputs& outputs) const {
  const Outputs& right = now_->decode.at({stream, prompt})[static_cast<size_t>(step)];
  for (size_t l = 0; l < right.size(); ++l) {
    if (!Same(outputs[l], right[l])) return false;
  }
  return true;
}

bool Truth::BlockIsRight(int64_t chunk, int32_t layer, std::span<const std::byte> bytes) const {
  const auto found = blocks_.find({chunk, layer});
  if (found == blocks_.end()) return false;
  const std::array<uint64_t, 2> hash = Hash128(bytes);
  return std::find(found->second.begin(), found->second.end(), hash) != found->second.end();
}

Status TruthStore::DoGet(const ChunkKey& key, std::span<std::byte> out, ChunkSeal* seal) {
  PREHOC_RETURN_IF_ERROR(base()->Get(key, out, seal));
  const std::array<uint64_t, 2> hash = Hash128(out);
  reads_.fetch_add(1, std::memory_order_relaxed);
  MutexLock lock(mutex_);
  const auto found = known_.find(key);
  if (found == known_.end()) {
    wrong_.push_back("chunk " + key.ToString() + " was read and never written");
  } else if (found->second != hash) {
    wrong_.push_back("chunk " + key.ToString() + " was read with other bytes than were written");
  }
  return {};
}

Status TruthStore::DoPut(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) {
  PREHOC_RETURN_IF_ERROR(NoteWrite(key, data, origin));
  return base()->Put(key, data, origin);
}

Status TruthStore::DoReplace(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) {
  PREHOC_RETURN_IF_ERROR(NoteWrite(key, data, origin));
  return base()->Replace(key, data, origin);
}

Status TruthStore::NoteWrite(const ChunkKey& key, std::span<const std::byte> data, const ChunkOrigin& origin) {
  if (plan_->Draw(Fault::kWriteError, rate_)) {
    plan_->Injected(Fault::kWriteError);
    return {StatusCode::kOutOfSpace, "the write failed on purpose"};
  }
  writes_.fetch_add(1, std::memory_order_relaxed);
  const bool right = truth_->BlockIsRight(origin.chunk, key.layer, data);
  MutexLock lock(mutex_);
  if (!right) wrong_.push_back("chunk " + key.ToString() + " was to be written with wrong bytes");
  known_[key] = Hash128(data);
  return {};
}

std::vector<std::string> TruthStore::TakeWrong() {
  MutexLock lock(mutex_);
  return std::exchange(wrong_, {});
}

TruthStore::Known TruthStore::TakeKnown() {
  MutexLock lock(mutex_);
  return std::exchange(known_, {});
}

void TruthStore::GiveKnown(Known known) {
  MutexLock lock(mutex_);
  known_ = std::move(known);
}

}  // namespace prehoc::torture
