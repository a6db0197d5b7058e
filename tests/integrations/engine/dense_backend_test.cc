// DenseBackend: the attention that everything is compared with, against fp64, and its rules of announcing.
#include <gtest/gtest.h>

#include <cmath>

#include "integrations/reference/attention_backend.h"
#include "tests/support/guarded.h"
#include "tests/support/seeded_rng.h"
#include "tests/support/status_matchers.h"

namespace prehoc::reference {
namespace {

constexpr int32_t kHeads = 6, kKvHeads = 2, kDim = 24;

struct Piece {
  int64_t count;
  std::vector<int32_t> tokens = std::vector<int32_t>(static_cast<size_t>(count));
  std::vector<float> q, k, v;
  Piece(Rng& rng, int64_t n)
      : count(n),
        q(rng.Normals(static_cast<size_t>(n * kHeads * kDim), 2)),
        k(rng.Normals(static_cast<size_t>(n * kKvHeads * kDim))),
        v(rng.Normals(static_cast<size_t>(n * kKvHeads * kDim))) {}
  AttendCall Call(int32_t layer, int64_t first, float* out) const {
    return {.layer = layer, .first = first, .count = count, .q = q.data(), .k = k.data(), .v = v.data(), .out = out};
  }
};

double WantAt(const std::vector<float>& k, const std::vector<float>& v, const float* q, int64_t visible, int64_t head,
              int64_t c) {
  const int64_t kv = head / (kHeads / kKvHeads);
  double sum = 0, out = 0;
  for (int64_t i = 0; i < visible; ++i) {
    const auto at = static_cast<size_t>((i * kKvHeads + kv) * kDim);
    double z = 0;
    for (size_t j = 0; j < kDim; ++j) z += static_cast<double>(q[j]) * static_cast<double>(k[at + j]);
    const double e = std::exp(z / std::sqrt(double{kDim}));
    sum += e;
    out += e * static_cast<double>(v[at + static_cast<size_t>(c)]);
  }
  return out / sum;
}

class DenseBackendTest : public testing::TestWithParam<int> {};

TEST_P(DenseBackendTest, AgreesWithFp64) {
  SeededRng rng(1);
  const auto pool = ThreadPool::Create({.loop_threads = 3}).value();
  DenseBackend backend(2, kHeads, kKvHeads, kDim, 100, GetParam() > 0 ? pool.get() : nullptr);
  std::vector<float> k, v;
  for (const int64_t count : {1, 19, 1, 40}) {
    const Piece piece(rng, count);
    const int64_t first = backend.length();
    ASSERT_OK(backend.Begin(piece.tokens, 0));
    k.insert(k.end(), piece.k.begin(), piece.k.end());
    v.insert(v.end(), piece.v.begin(), piece.v.end());
    for (const int32_t layer : {0, 1}) {
      Guarded<float> out(piece.q.size());
      ASSERT_OK(backend.Attend(piece.Call(layer, first, out.data())));
      for (int64_t i = 0; i < count * kHeads * kDim; ++i) {
        const int64_t t = i / (kHeads * kDim), head = i / kDim % kHeads;
        const float* q = piece.q.data() + (t * kHeads + head) * kDim;
        ASSERT_NEAR(out[static_cast<size_t>(i)], WantAt(k, v, q, first + t + 1, head, i % kDim), 3e-6) << "element " << i;
      }
      EXPECT_TRUE(out.GuardsIntact());
    }
    ASSERT_OK(backend.End());
  }
  EXPECT_EQ(backend.length(), 61);
}

INSTANTIATE_TEST_SUITE_P(Threads, DenseBackendTest, testing::Values(0, 1));

TEST(DenseBackendTest, SkippedQueriesLeaveTheirKeysAndValuesOnly) {
  SeededRng rng(2);
  const Piece piece(rng, 10);
  DenseBackend all(1, kHeads, kKvHeads, kDim, 100), some(1, kHeads, kKvHeads, kDim, 100);
  std::vector<float> want(piece.q.size());
  ASSERT_OK(all.Begin(piece.tokens, 0));
  ASSERT_OK(all.Attend(piece.Call(0, 0, want.data())));
  for (const int64_t skip : {4, 10}) {
    ASSERT_OK(some.Begin(piece.tokens, 10));
    const size_t skipped = static_cast<size_t>(skip * kHeads * kDim);
    Guarded<float> out(piece.q.size() - skipped);
    AttendCall call = piece.Call(0, 0, out.data());
    call.q_skip = skip;
    call.q += skipped;
    ASSERT_OK(some.Attend(call));
    for (size_t i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], want[skipped + i]);
    EXPECT_TRUE(out.GuardsIntact());
    some.Rollback();
  }
}

TEST(DenseBackendTest, RefusesWhatWasNotAnnounced) {
  SeededRng rng(3);
  const Piece piece(rng, 3);
  std::vector<float> out(piece.q.size());
  DenseBackend backend(2, kHeads, kKvHeads, kDim, 4);
  EXPECT_STATUS(StatusCode::kInvalid, "no tokens", backend.Begin({}, 0));
  EXPECT_STATUS(StatusCode::kInvalid, "no tokens announced", backend.End());
  EXPECT_STATUS(StatusCode::kInvalid, "are not the announced", backend.Attend(piece.Call(0, 0, out.data())));
  ASSERT_OK(backend.Begin(piece.tokens, 0));
  EXPECT_STATUS(StatusCode::kInvalid, "announced already", backend.Begin(piece.tokens, 0));
  EXPECT_STATUS(StatusCode::kInvalid, "layer 2 of 2", backend.Attend(piece.Call(2, 0, out.data())));
  EXPECT_STATUS(StatusCode::kInvalid, "[1, 4) are not the announced", backend.Attend(piece.Call(0, 1, out.data())));
  ASSERT_OK(backend.Attend(piece.Call(0, 0, out.data())));
  EXPECT_STATUS(StatusCode::kInvalid, "layer 1 was not given", backend.End());
  ASSERT_OK(backend.Attend(piece.Call(1, 0, out.data())));
  ASSERT_OK(backend.End());
  EXPECT_STATUS(StatusCode::kOutOfSpace, "6 tokens, room for 4", backend.Begin(piece.tokens, 0));
}

TEST(DenseBackendTest, RollbackForgets) {
  SeededRng rng(4);
  const Piece first(rng, 3), wrong(rng, 2), right(rng, 2);
  DenseBackend backend(1, kHeads, kKvHeads, kDim, 100), clean(1, kHeads, kKvHeads, kDim, 100);
  std::vector<float> out(first.q.size()), want(first.q.size());
  const auto give = [&](DenseBackend& to, const Piece& piece, std::vector<float>& result) {
    ASSERT_OK(to.Begin(piece.tokens, 0));
    ASSERT_OK(to.Attend(piece.Call(0, to.length(), result.data())));
  };
  give(backend, first, out);
  ASSERT_OK(backend.End());
  give(backend, wrong, out);
  backend.Rollback();
  EXPECT_EQ(backend.length(), 3);
  give(backend, right, out);
  give(clean, first, want);
  ASSERT_OK(clean.End());
  give(clean, right, want);
  EXPECT_EQ(out, want);
}

}  // namespace
}  // namespace prehoc::reference
