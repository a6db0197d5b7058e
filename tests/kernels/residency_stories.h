// Where rows are, and which stay: resolve, refresh, land, adopt, and attention that keeps what it read; part of step_stories.h.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <set>
#include <vector>

#include "kernels/row_codec.h"
#include "tests/kernels/story_world.h"

namespace prehoc {

// Rows in a slot, in the ring, in host memory, in a chunk that is not there, and none at all.
template <class World>
void ResolveFindsEachRowWhereItIs(World world) {
  SeededRng rng;
  constexpr int32_t kMaxN = 1000, kN = 900, kRing = 64, kGroup = 2;
  StoryChunks chunks(rng, kMaxN, 0);
  chunks.first_row[7 / 16] = -1, chunks.first_row[300 / 16] = -1;
  std::vector<int16_t> where(kMaxN, -1);
  where[5] = 3, where[835] = 0, where[899] = 1;  // 899 lies in the ring: that is newer
  const Of<World, int16_t> slot_of(where);
  const Of<World, int32_t> owner(std::vector<int32_t>(8, -1)), chunk_row(chunks.first_row), length(std::vector<int32_t>{kN});
  std::vector<uint64_t> bits(16, 0);
  for (int32_t p = kN - 1 - kRing; p < kN - 1; ++p) bits[static_cast<size_t>(p / 64)] |= uint64_t{1} << (p % 64);
  Of<World, uint64_t> resident(bits);
  Of<World, int32_t> refs(9), num(1), age(std::vector<int32_t>{4}), far(std::vector<int32_t>{100}), count(std::vector<int32_t>{9});
  const std::vector<float> query(kGroup * kStoryDim, 2.5f), before(query.size(), -1.0f);
  const Of<World, float> q(query);
  Of<World, float> anchor(before);
  Of<World, int64_t> misses(std::vector<int64_t>{10});
  const Of<World, int32_t> chosen(std::vector<int32_t>{5, 16, 300, 835, 836, 899, 900, -1, 1000});
  Of<World, uint8_t> hold(std::vector<uint8_t>{1});
  const Of<World, step::ResolveTask> task(std::vector<step::ResolveTask>{
      {.at = {slot_of.data(), owner.data(), resident.data(), 8, kMaxN}, .chosen = chosen.data(), .count = count.data(), .room = 9, .n = length.data(),
       .slot_row = 100, .ring_row = 20, .ring_rows = kRing, .refs = refs.data(), .num_refs = num.data(), .misses = misses.data(), .far = far.data(),
       .host = chunks.Table(chunk_row.data()), .hold = hold.data(), .q = q.data(), .anchor = anchor.data(), .age = age.data()}});
  const step::ResolveParams params{.tasks = task.data(), .num_tasks = 1, .group = kGroup, .head_dim = kStoryDim};
  world.Run(world.kernels().resolve(params, world.stream()));
  EXPECT_EQ(refs.Read(), (std::vector<int32_t>{103, ~chunks.RowOf(16), kNoRow, 100, 20 + 836 % kRing, 20 + 899 % kRing, kNoRow, kNoRow, kNoRow}));
  EXPECT_EQ(num.Read()[0], 9);
  EXPECT_EQ(misses.Read()[0], 11) << "what is far cannot be read from the host";
  EXPECT_EQ(far.Read()[0], 101) << "positions that do not exist are not far";
  EXPECT_EQ(anchor.Read(), before) << "an inherited choice keeps its anchor";
  EXPECT_EQ(age.Read()[0], 5);
  // The bits of the ring: 899 came, 836 will be overwritten by the next; 835 was left by the last call, and is not of this one's business.
  bits[899 / 64] |= uint64_t{1} << (899 % 64), bits[836 / 64] &= ~(uint64_t{1} << (836 % 64));
  EXPECT_EQ(resident.Read(), bits);

  hold.Write({0});
  count.Write({10});  // more than there is room for
  world.Run(world.kernels().resolve(params, world.stream()));
  EXPECT_EQ(num.Read()[0], -1) << "attend makes NaN of it";
  EXPECT_EQ(anchor.Read(), query);
  EXPECT_EQ(age.Read()[0], 0);
  EXPECT_EQ(resident.Read(), bits) << "the same step again changes nothing";
  EXPECT_TRUE(refs.GuardsIntact() && anchor.GuardsIntact() && resident.GuardsIntact() && far.GuardsIntact() && misses.GuardsIntact());
}

// Steps of a head with refreshes between: after each, the bits are those of the ring and of the slots, and slots hold what was wanted.
template <class World>
void ResidencyFollowsAModel(World world) {
  SeededRng rng;
  for (const int32_t max_n : {70, 1000, 5000}) {
    SCOPED_TRACE(testing::Message() << "max_n " << max_n);
    const int32_t slots = std::max(4, max_n / 16), ring = max_n < 100 ? 8 : 64;
    const StoryChunks chunks(rng, max_n, 0.1);
    Of<World, int16_t> slot_of(std::vector<int16_t>(static_cast<size_t>(max_n), -1));
    Of<World, int32_t> owner(std::vector<int32_t>(static_cast<size_t>(slots), -1));
    Of<World, uint64_t> resident(std::vector<uint64_t>(static_cast<size_t>((max_n + 63) / 64), 0));
    const step::ResidencyState at{slot_of.data(), owner.data(), resident.data(), slots, max_n};
    Of<World, int32_t> wanted(static_cast<size_t>(slots + 1)), position(static_cast<size_t>(slots)), from(static_cast<size_t>(slots)),
        to(static_cast<size_t>(slots)), counts(2), length(1), none(std::vector<int32_t>{0}), refs(1), num(1);
    Of<World, float> pooled(static_cast<size_t>(max_n));
    const Of<World, int32_t> chunk_row(chunks.first_row);
    const Of<World, step::RefreshTask> refresh(std::vector<step::RefreshTask>{
        {.at = at, .wanted = wanted.data(), .wanted_count = counts.data(), .host = chunks.Table(chunk_row.data()), .n = length.data(),
         .ring_rows = ring, .position = position.data(), .from_piece = from.data(), .to_piece = to.data(), .count = counts.data() + 1,
         .pooled = pooled.data()}});
    const Of<World, step::ResolveTask> resolve(std::vector<step::ResolveTask>{
        {.at = at, .chosen = none.data(), .count = none.data(), .n = length.data(), .ring_rows = ring, .refs = refs.data(), .num_refs = num.data()}});
    std::map<int32_t, int32_t> held;  // the model: position to slot
    // Bits of what is in a slot, and of the ring as the next position will find it.
    const auto expect_bits = [&](int32_t n, const std::map<int32_t, int32_t>& in_slots, const char* when) {
      const std::vector<uint64_t> bits = resident.Read();
      for (int32_t p = 0; p < max_n; ++p) {
        const bool in_ring = p < n && p > n - ring;
        const uint64_t want = in_ring || in_slots.count(p) > 0 ? 1 : 0;
        ASSERT_EQ(bits[static_cast<size_t>(p / 64)] >> (p % 64) & 1, want) << when << ", n " << n << ", position " << p;
      }
    };
    int32_t n = 1;
    for (; n <= std::min(max_n, 400); ++n) {
      length.Write({n});
      world.Run(world.kernels().resolve({.tasks = resolve.data(), .num_tasks = 1, .group = 1, .head_dim = kStoryDim}, world.stream()));
      if (n % 9 != 0) continue;
      expect_bits(n, held, "after resolve");
      if (testing::Test::HasFatalFailure()) return;
      // Of what there is, and sometimes of what is not there yet, or in a chunk that is away.
      std::set<int32_t> want;
      const auto most = static_cast<size_t>(rng.Int(0, std::min(slots, n)));
      while (want.size() < most) want.insert(static_cast<int32_t>(rng.Int(0, n - 1)));
      std::vector<int32_t> list(want.begin(), want.end());
      list.resize(static_cast<size_t>(slots + 1), max_n + 7);  // behind the count: never looked at
      wanted.Write(list);
      counts.Write({static_cast<int32_t>(want.size()), -1});
      world.Run(world.kernels().refresh({.tasks = refresh.data(), .num_tasks = 1, .max_n = max_n}, world.stream()));
      std::set<int32_t> missing;
      for (const int32_t p : want) {
        if (held.count(p) == 0 && chunks.Has(p)) missing.insert(p);
      }
      const int32_t fetched = counts.Read()[1];
      ASSERT_EQ(fetched, static_cast<int32_t>(missing.size())) << "n " << n;  // all fit
      const std::vector<int32_t> positions = position.Read(), pieces = from.Read(), places = to.Read(), owners = owner.Read();
      EXPECT_EQ(std::set<int32_t>(positions.begin(), positions.begin() + fetched), missing);
      EXPECT_EQ(std::set<int32_t>(places.begin(), places.begin() + fetched).size(), missing.size()) << "a slot is given once";
      const size_t free = static_cast<size_t>(slots) - held.size();
      for (size_t i = 0; i < static_cast<size_t>(fetched); ++i) {
        ASSERT_TRUE(places[i] >= 0 && places[i] < slots);
        EXPECT_EQ(pieces[i], chunks.RowOf(positions[i]));
        EXPECT_EQ(owners[static_cast<size_t>(places[i])], -2) << "on its way";
      }
      size_t evicted = 0;
      for (size_t i = 0; i < static_cast<size_t>(fetched); ++i) {
        evicted += std::erase_if(held, [&](const auto& entry) { return entry.second == places[i]; });
      }
      EXPECT_EQ(evicted, missing.size() - std::min(missing.size(), free)) << "free slots come first";
      for (const int32_t p : want) EXPECT_TRUE(held.count(p) > 0 || missing.count(p) > 0 || !chunks.Has(p)) << "a wanted row was evicted: " << p;
      expect_bits(n, held, "between refresh and land");
      if (testing::Test::HasFatalFailure()) return;
      world.Run(world.kernels().land({.tasks = refresh.data(), .num_tasks = 1, .max_n = max_n}, world.stream()));
      for (size_t i = 0; i < static_cast<size_t>(fetched); ++i) held[positions[i]] = places[i];
      const std::vector<int16_t> after = slot_of.Read();
      for (int32_t p = 0; p < max_n; ++p) ASSERT_EQ(after[static_cast<size_t>(p)], held.count(p) > 0 ? held[p] : -1) << p;
      for (const float score : pooled.Read()) ASSERT_EQ(score, -std::numeric_limits<float>::infinity());
    }
    EXPECT_TRUE(slot_of.GuardsIntact() && owner.GuardsIntact() && resident.GuardsIntact() && position.GuardsIntact() && from.GuardsIntact() &&
                to.GuardsIntact() && pooled.GuardsIntact());
  }
}

// Steps that keep the rows which they read from the host: each slot has the row of its position, those that are read again are found there, and the rows that
// leave are the ones that a clock's hand finds unused.
template <class World>
void RowsReadWithinAStepStay(World world) {
  using State = step::SpareSlots::State;
  SeededRng rng;
  for (const int32_t max_n : {200, 5000}) {
    for (const RowFormat format : {RowFormat::kF16, RowFormat::kInt8}) {
      SCOPED_TRACE(testing::Message() << "max_n " << max_n << ", " << RowFormatName(format));
      const int32_t slots = max_n < 1000 ? 40 : 1300, room = slots / 8, k = slots / 4, ring = 16, row = 2 * kStoryDim;
      const StoryChunks chunks(rng, max_n, 0.05);
      const std::vector<Half> made = MakeRows(rng, chunks.rows(), kStoryDim);
      const size_t bytes = RowBytes(format, kStoryDim);
      std::vector<std::byte> stored(static_cast<size_t>(chunks.rows()) * bytes);
      std::vector<Half> wide(made.size());  // what they stand for
      for (int32_t r = 0; r < chunks.rows(); ++r) {
        std::byte* const to = stored.data() + static_cast<size_t>(r) * bytes;
        const Half* const from = made.data() + int64_t{r} * row;
        if (format == RowFormat::kF16) std::memcpy(to, from, bytes), std::copy_n(from, row, wide.begin() + int64_t{r} * row);
        else NarrowRow(from, format, kStoryDim, to), WidenRow(to, format, kStoryDim, wide.data() + int64_t{r} * row);
      }
      const Of<World, std::byte> host(stored, World::kHostMemory);
      Of<World, Half> rows(MakeRows(rng, ring + slots, kStoryDim));
      const Of<World, float> q(rng.Normals(kStoryDim));
      Of<World, float> out(kStoryDim);
      Of<World, int16_t> slot_of(std::vector<int16_t>(static_cast<size_t>(max_n), -1)), spare(static_cast<size_t>(room)), keep(static_cast<size_t>(k));
      Of<World, int32_t> owner(std::vector<int32_t>(static_cast<size_t>(slots), -1)), position(static_cast<size_t>(room)), chosen(static_cast<size_t>(k)),
          count(1), refs(static_cast<size_t>(k)), num(1);
      Of<World, uint64_t> resident(std::vector<uint64_t>(static_cast<size_t>((max_n + 63) / 64), 0));
      Of<World, uint8_t> used(std::vector<uint8_t>(static_cast<size_t>(slots), 0));
      Of<World, State> state(std::vector<State>{{}});
      const Of<World, int32_t> chunk_row(chunks.first_row), length(std::vector<int32_t>{max_n});
      const step::ResidencyState at{slot_of.data(), owner.data(), resident.data(), slots, max_n, {state.data(), spare.data(), position.data(), used.data(), room}};
      const Of<World, step::ResolveTask> resolve(std::vector<step::ResolveTask>{
          {.at = at, .chosen = chosen.data(), .count = count.data(), .room = k, .n = length.data(), .slot_row = ring, .ring_rows = ring, .refs = refs.data(),
           .keep = keep.data(), .num_refs = num.data(), .host = chunks.Table(chunk_row.data())}});
      const Of<World, step::AttendTask> attend(std::vector<step::AttendTask>{
          {.q = q.data(), .out = out.data(), .rows = rows.data(), .row_limit = ring + slots, .ring_rows = ring, .n = length.data(), .refs = refs.data(),
           .num_refs = num.data(), .refs_room = k, .host_rows = host.data(), .host_limit = chunks.rows(), .keep = keep.data(),
           .slots = rows.data() + int64_t{ring} * row, .slot_limit = slots}});
      const Of<World, step::AdoptTask> adopt(std::vector<step::AdoptTask>{{.at = at, .n = length.data(), .ring_rows = ring}});
      step::AttendParams attending{.tasks = attend.data(), .num_tasks = 1, .max_rows = k, .host_format = format, .group = 1, .head_dim = kStoryDim};
      const auto workspace = StoryWorkspace<World>(world.kernels().attend_workspace(attending));
      attending.workspace = workspace.data(), attending.workspace_bytes = workspace.size();

      std::vector<int32_t> owners(static_cast<size_t>(slots), -1);  // the model
      std::vector<uint8_t> uses(static_cast<size_t>(slots), 0);
      std::vector<int16_t> free;
      std::map<int32_t, int32_t> held;
      int32_t hand = 0;
      size_t kept_in_all = 0, short_of = 0, found = 0;
      std::set<int32_t> choice;
      for (int step = 0; step < 40; ++step) {
        std::erase_if(choice, [&](int32_t) { return rng.Chance(step % 10 == 9 ? 0.9 : 0.25); });
        while (choice.size() < static_cast<size_t>(k)) choice.insert(static_cast<int32_t>(rng.Int(0, max_n - 1)));
        const std::vector<int32_t> list(choice.begin(), choice.end());
        chosen.Write(list), count.Write({k});
        keep.Write(std::vector<int16_t>(static_cast<size_t>(k), 17));
        world.Run(world.kernels().resolve({.tasks = resolve.data(), .num_tasks = 1, .group = 1, .head_dim = kStoryDim}, world.stream()));
        world.Run(world.kernels().attend(attending, world.stream()));
        const std::vector<int32_t> ref = refs.Read(), taken_by = position.Read();
        const std::vector<int16_t> kept = keep.Read();
        const std::vector<Half> now = rows.Read();
        std::map<int32_t, int32_t> taken;  // position to slot
        size_t misses = 0;
        for (size_t i = 0; i < list.size(); ++i) {
          const int32_t p = list[i];
          if (p >= max_n - ring) {
            ASSERT_EQ(ref[i], p % ring);
          } else if (held.count(p) > 0) {
            ASSERT_EQ(ref[i], ring + held[p]) << "step " << step << ", position " << p;
            uses[static_cast<size_t>(held[p])] = 1;
            ++found;
          } else if (!chunks.Has(p)) {
            ASSERT_EQ(ref[i], kNoRow);
          } else {
            ASSERT_EQ(ref[i], ~chunks.RowOf(p));
            ++misses;
            if (kept[i] >= 0) taken[p] = kept[i];
          }
        }
        ASSERT_EQ(state.Read()[0].taken, static_cast<int32_t>(misses));
        ASSERT_EQ(taken.size(), std::min(misses, free.size())) << "step " << step;
        for (size_t i = 0; i < taken.size(); ++i) {
          ASSERT_EQ(taken.count(taken_by[i]), 1u) << "step " << step;
          ASSERT_EQ(taken[taken_by[i]], free[i]) << "step " << step << ": the slot of position " << taken_by[i];
        }
        for (const auto& [p, slot] : taken) {
          ASSERT_TRUE(std::equal(wide.begin() + int64_t{chunks.RowOf(p)} * row, wide.begin() + (int64_t{chunks.RowOf(p)} + 1) * row,
                                 now.begin() + (int64_t{ring} + slot) * row)) << "step " << step << ", position " << p;
        }
        kept_in_all += taken.size(), short_of += misses - taken.size();

        world.Run(world.kernels().adopt({.tasks = adopt.data(), .num_tasks = 1}, world.stream()));
        for (const auto& [p, slot] : taken) held[p] = slot, owners[static_cast<size_t>(slot)] = p;
        free.erase(free.begin(), free.begin() + static_cast<std::ptrdiff_t>(taken.size()));
        for (int32_t looked = 0; looked < slots && static_cast<int32_t>(free.size()) < room; ++looked, hand = (hand + 1) % slots) {
          const auto slot = static_cast<size_t>(hand);
          if (owners[slot] == -3) continue;
          if (owners[slot] >= 0 && uses[slot] != 0) {
            uses[slot] = 0;
            continue;
          }
          held.erase(owners[slot]);
          owners[slot] = -3;
          free.push_back(static_cast<int16_t>(slot));
        }
        const State after = state.Read()[0];
        ASSERT_EQ(after.free, static_cast<int32_t>(free.size())) << "step " << step;
        ASSERT_EQ(after.hand, hand) << "step " << step;
        ASSERT_EQ(after.taken, 0);
        const std::vector<int16_t> listed = spare.Read(), where = slot_of.Read();
        ASSERT_TRUE(std::equal(free.begin(), free.end(), listed.begin())) << "step " << step;
        ASSERT_EQ(owner.Read(), owners) << "step " << step;
        ASSERT_EQ(used.Read(), uses) << "step " << step;
        const std::vector<uint64_t> bits = resident.Read();
        for (int32_t p = 0; p < max_n - ring; ++p) {
          ASSERT_EQ(where[static_cast<size_t>(p)], held.count(p) > 0 ? held[p] : -1) << "step " << step << ", position " << p;
          ASSERT_EQ(bits[static_cast<size_t>(p / 64)] >> (p % 64) & 1, held.count(p)) << "step " << step << ", position " << p;
        }
      }
      EXPECT_GT(kept_in_all, static_cast<size_t>(slots)) << "the hand has not gone round";
      EXPECT_GT(short_of, 0u) << "there was room for all";
      EXPECT_GT(found, kept_in_all / 2) << "nothing was read again";
      EXPECT_TRUE(slot_of.GuardsIntact() && spare.GuardsIntact() && keep.GuardsIntact() && owner.GuardsIntact() && position.GuardsIntact() &&
                  resident.GuardsIntact() && used.GuardsIntact() && state.GuardsIntact() && rows.GuardsIntact());
    }
  }
}

// A position that has come by a refresh meanwhile needs no second slot; the ring's bits stay; one that is on its way is left alone.
template <class World>
void AdoptLeavesWhatHasComeAndWhatIsComing(World world) {
  using State = step::SpareSlots::State;
  // Slots: 0 spare (position 5 took it), 1 spare (position 6 took it, which has landed in 2), 3 on its way, 4 free, 5 of position 9 (in the ring), 6 used.
  Of<World, int16_t> slot_of(std::vector<int16_t>{-1, -1, -1, -1, -1, -1, 2, -1, 6, 5}), spare(std::vector<int16_t>{0, 1, -7});
  Of<World, int32_t> owner(std::vector<int32_t>{-3, -3, 6, -2, -1, 9, 8}), position(std::vector<int32_t>{5, 6, -7});
  Of<World, uint64_t> resident(std::vector<uint64_t>{1 << 6 | 1 << 8 | 1 << 9});
  Of<World, uint8_t> used(std::vector<uint8_t>{0, 0, 1, 0, 1, 0, 1});
  Of<World, State> state(std::vector<State>{{.free = 2, .taken = 9, .hand = 4}});
  const Of<World, int32_t> n(std::vector<int32_t>{10});
  const Of<World, step::AdoptTask> task(std::vector<step::AdoptTask>{
      {.at = {slot_of.data(), owner.data(), resident.data(), 7, 10, {state.data(), spare.data(), position.data(), used.data(), 3}}, .n = n.data(), .ring_rows = 4}});
  world.Run(world.kernels().adopt({.tasks = task.data(), .num_tasks = 1}, world.stream()));
  // From 4 on: free; 9 leaves, but for its bit, since the ring has it; 6 has a second chance; 5 has just come, and goes.
  EXPECT_EQ(owner.Read(), (std::vector<int32_t>{-3, -1, 6, -2, -3, -3, 8}));
  EXPECT_EQ(spare.Read(), (std::vector<int16_t>{4, 5, 0}));
  EXPECT_EQ(slot_of.Read(), (std::vector<int16_t>{-1, -1, -1, -1, -1, -1, 2, -1, 6, -1}));
  EXPECT_EQ(used.Read(), (std::vector<uint8_t>{0, 0, 1, 0, 1, 0, 0}));
  EXPECT_EQ(resident.Read()[0], uint64_t{1 << 6 | 1 << 8 | 1 << 9});
  const State after = state.Read()[0];
  EXPECT_EQ(after.free, 3);
  EXPECT_EQ(after.taken, 0);
  EXPECT_EQ(after.hand, 1);
  // All are used or out of reach: one round, and no more.
  used.Write(std::vector<uint8_t>(7, 1)), state.Write({{.free = 3, .taken = 2, .hand = 1}}), position.Write({1, 2, -7});
  world.Run(world.kernels().adopt({.tasks = task.data(), .num_tasks = 1}, world.stream()));
  EXPECT_EQ(owner.Read(), (std::vector<int32_t>{-3, -3, 6, -2, 1, 2, 8}));
  EXPECT_EQ(state.Read()[0].free, 2) << "the one that was left, and the free one";
  EXPECT_EQ(state.Read()[0].hand, 1);
  EXPECT_EQ(used.Read(), (std::vector<uint8_t>{1, 1, 0, 1, 0, 0, 0}));
  EXPECT_TRUE(slot_of.GuardsIntact() && spare.GuardsIntact() && owner.GuardsIntact() && position.GuardsIntact() && resident.GuardsIntact() &&
              used.GuardsIntact() && state.GuardsIntact());
}

template <class World>
void RefreshTakesNoMoreThanThereIs(World world) {
  Of<World, int16_t> slot_of(std::vector<int16_t>{0, -1, -1, -1, -1, -1, -1, -1});
  Of<World, int32_t> owner(std::vector<int32_t>{0, -2, -1, -3});  // kept, on its way, free, spare
  Of<World, uint64_t> resident(std::vector<uint64_t>{1});
  Of<World, int32_t> position(4), from(4), to(4), count(1), wanted_count(std::vector<int32_t>{3});
  const Of<World, int32_t> wanted(std::vector<int32_t>{0, 4, 5, 7});
  const Of<World, step::RefreshTask> task(std::vector<step::RefreshTask>{
      {.at = {slot_of.data(), owner.data(), resident.data(), 4, 8}, .wanted = wanted.data(), .wanted_count = wanted_count.data(),
       .position = position.data(), .from_piece = from.data(), .to_piece = to.data(), .count = count.data()}});
  const step::RefreshParams params{.tasks = task.data(), .num_tasks = 1, .max_n = 8};
  world.Run(world.kernels().refresh(params, world.stream()));
  ASSERT_EQ(count.Read()[0], 1) << "one slot is free, one wanted, one on its way, one spare";
  EXPECT_EQ(position.Read()[0], 4);
  EXPECT_EQ(from.Read()[0], 4) << "without chunks a position is its row";
  EXPECT_EQ(owner.Read(), (std::vector<int32_t>{0, -2, -2, -3}));
  for (const int32_t broken : {-1, 5}) {
    wanted_count.Write({broken});
    world.Run(world.kernels().refresh(params, world.stream()));
    EXPECT_EQ(count.Read()[0], 0) << "a count that is none: " << broken;
  }
  EXPECT_TRUE(position.GuardsIntact() && from.GuardsIntact() && to.GuardsIntact() && owner.GuardsIntact());
}

}  // namespace prehoc
