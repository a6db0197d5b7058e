// resolve, refresh and land against a model: a map from positions to slots.
#include <algorithm>
#include <map>
#include <set>

#include "tests/kernels/cuda/cuda_kernel_test.h"

namespace prehoc {
namespace {

class CudaResidencyTest : public CudaKernelTest {};

TEST_F(CudaResidencyTest, ManyTurnsKeepWhatIsWanted) {
  Rng rng = SeededRng();
  for (const int32_t max_n : {1, 63, 64, 65, 1000, 5000}) {
    const int32_t slots = std::max(1, max_n / 4);
    CudaArray<int16_t> slot_of(std::vector<int16_t>(static_cast<size_t>(max_n), -1));
    CudaArray<int32_t> owner(std::vector<int32_t>(static_cast<size_t>(slots), -1));
    CudaArray<uint64_t> resident(std::vector<uint64_t>(static_cast<size_t>((max_n + 63) / 64), 0));
    const cuda::ResidencyState at{slot_of.data(), owner.data(), resident.data(), slots, max_n};
    CudaArray<int32_t> wanted(static_cast<size_t>(slots + 1)), from(static_cast<size_t>(slots)), to(static_cast<size_t>(slots)), counts(2);
    CudaArray<float> pooled(static_cast<size_t>(max_n));
    const CudaArray<cuda::RefreshTask> task(std::vector<cuda::RefreshTask>{{.at = at, .wanted = wanted.data(), .wanted_count = counts.data(),
        .from_piece = from.data(), .to_piece = to.data(), .count = counts.data() + 1, .pooled = pooled.data()}});
    std::map<int32_t, int32_t> held;  // the model: position to slot
    for (int turn = 0; turn < 12; ++turn) {
      std::set<int32_t> want;
      const auto most = static_cast<size_t>(rng.Int(0, slots));
      while (want.size() < most) want.insert(static_cast<int32_t>(rng.Int(0, max_n - 1)));
      std::vector<int32_t> list(want.begin(), want.end());
      list.resize(static_cast<size_t>(slots + 1), max_n + 7);  // behind the count: never looked at
      wanted.Write(list);
      counts.Write({static_cast<int32_t>(want.size()), -1});
      ASSERT_OK(cuda::Refresh(task.data(), 1, max_n, stream()));
      ASSERT_OK(Wait());
      const int32_t fetched = counts.Read()[1];
      const std::vector<int32_t> pieces = from.Read(), places = to.Read(), owners = owner.Read();
      const std::vector<int16_t> where = slot_of.Read();
      std::set<int32_t> missing;
      for (const int32_t p : want) {
        if (held.count(p) == 0) missing.insert(p);
      }
      // All fit: there are at least as many slots as are wanted.
      ASSERT_EQ(fetched, static_cast<int32_t>(missing.size())) << "max_n " << max_n << " turn " << turn;
      EXPECT_EQ(std::set<int32_t>(pieces.begin(), pieces.begin() + fetched), missing);
      EXPECT_EQ(std::set<int32_t>(places.begin(), places.begin() + fetched).size(), missing.size()) << "a slot is given once";
      for (int32_t i = 0; i < fetched; ++i) {
        const int32_t slot = places[static_cast<size_t>(i)];
        ASSERT_TRUE(slot >= 0 && slot < slots);
        EXPECT_EQ(owners[static_cast<size_t>(slot)], -2);
        std::erase_if(held, [&](const auto& entry) { return entry.second == slot; });
      }
      for (int32_t p = 0; p < max_n; ++p) EXPECT_EQ(where[static_cast<size_t>(p)], held.count(p) ? held[p] : -1) << "between refresh and land, " << p;
      for (const int32_t p : want) EXPECT_TRUE(held.count(p) > 0 || missing.count(p) > 0) << "a wanted row was evicted";
      ASSERT_OK(cuda::Land(task.data(), 1, stream()));
      ASSERT_OK(Wait());
      for (int32_t i = 0; i < fetched; ++i) held[pieces[static_cast<size_t>(i)]] = places[static_cast<size_t>(i)];
      const std::vector<int16_t> after = slot_of.Read();
      const std::vector<uint64_t> bits = resident.Read();
      for (int32_t p = 0; p < max_n; ++p) {
        ASSERT_EQ(after[static_cast<size_t>(p)], held.count(p) ? held[p] : -1);
        ASSERT_EQ(bits[static_cast<size_t>(p) / 64] >> (p % 64) & 1, held.count(p)) << p;
      }
      for (const float score : pooled.Read()) ASSERT_EQ(score, -std::numeric_limits<float>::infinity());
    }
    EXPECT_TRUE(slot_of.GuardsIntact() && owner.GuardsIntact() && resident.GuardsIntact() && from.GuardsIntact() && to.GuardsIntact() &&
                pooled.GuardsIntact());
  }
}

TEST_F(CudaResidencyTest, ResolveFindsRingSlotAndHost) {
  const int32_t max_n = 1000, n = 900, ring_rows = 64, d = 64, group = 2;
  std::vector<int16_t> where(max_n, -1);
  where[5] = 3, where[835] = 0, where[899] = 1;  // 899 lies in the ring: that is newer
  CudaArray<int16_t> slot_of(where);
  CudaArray<int32_t> owner(std::vector<int32_t>(8, -1)), refs(8), num(1), age(std::vector<int32_t>{4});
  CudaArray<uint64_t> resident(16);
  const std::vector<float> query(static_cast<size_t>(group * d), 2.5f), before(query.size(), -1.0f);
  CudaArray<float> q(query), anchor(before);
  CudaArray<int64_t> misses(std::vector<int64_t>{10});
  CudaArray<int32_t> length(std::vector<int32_t>{n});
  const std::vector<int32_t> chosen{5, 6, 835, 836, 899, 900, -1, 1000};
  CudaArray<int32_t> positions(chosen), count(std::vector<int32_t>{8});
  CudaArray<uint8_t> hold(std::vector<uint8_t>{1});
  const CudaArray<cuda::ResolveTask> task(std::vector<cuda::ResolveTask>{{.at = {slot_of.data(), owner.data(), resident.data(), 8, max_n},
      .chosen = positions.data(), .count = count.data(), .room = 8, .n = length.data(), .slot_row = 100, .ring_row = 20, .ring_rows = ring_rows,
      .refs = refs.data(), .num_refs = num.data(), .misses = misses.data(), .hold = hold.data(), .q = q.data(), .anchor = anchor.data(),
      .age = age.data()}});
  ASSERT_OK(cuda::Resolve(task.data(), 1, group, d, stream()));
  ASSERT_OK(Wait());
  const int32_t nowhere = 0x7fffffff;
  EXPECT_EQ(refs.Read(), (std::vector<int32_t>{103, ~6, 100, 20 + 836 % 64, 20 + 899 % 64, nowhere, nowhere, nowhere}));
  EXPECT_EQ(num.Read(), std::vector<int32_t>{8});
  EXPECT_EQ(misses.Read(), std::vector<int64_t>{11});
  EXPECT_EQ(anchor.Read(), before) << "an inherited choice keeps its anchor";
  EXPECT_EQ(age.Read(), std::vector<int32_t>{5});

  hold.Write({0});
  count.Write({9});  // more than there is room for
  ASSERT_OK(cuda::Resolve(task.data(), 1, group, d, stream()));
  ASSERT_OK(Wait());
  EXPECT_EQ(num.Read(), std::vector<int32_t>{-1}) << "attend makes NaN of it";
  EXPECT_EQ(anchor.Read(), query);
  EXPECT_EQ(age.Read(), std::vector<int32_t>{0});
  EXPECT_TRUE(refs.GuardsIntact() && anchor.GuardsIntact());
}

}  // namespace
}  // namespace prehoc
