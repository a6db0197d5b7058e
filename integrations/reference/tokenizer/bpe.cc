#include "integrations/reference/tokenizer/bpe.h"

#include <algorithm>
#include <limits>
#include <queue>
#include <tuple>

namespace prehoc::reference {
namespace {

// Up to here scanning for the lowest rank beats a heap.
constexpr size_t kShort = 48;

uint64_t Pair(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

bool MergeTable::Add(int32_t left, int32_t right, int32_t rank, int32_t result) {
  return merges_.emplace(Pair(left, right), Merge{rank, result}).second;
}

const MergeTable::Merge* MergeTable::Find(int32_t left, int32_t right) const {
  const auto it = merges_.find(Pair(left, right));
  return it == merges_.end() ? nullptr : &it->second;
}

void MergeTable::Apply(std::vector<int32_t>* ids) const {
  if (ids->size() <= kShort) {
    ApplyShort(ids);
  } else {
    ApplyLong(ids);
  }
}

void MergeTable::ApplyShort(std::vector<int32_t>* ids) const {
  constexpr Merge kNoMerge{std::numeric_limits<int32_t>::max(), -1};
  size_t size = ids->size();
  if (size < 2) return;
  Merge merges[kShort];  // [size - 1], of each id with the next
  const auto look_up = [&](size_t i) {
    const Merge* merge = Find((*ids)[i], (*ids)[i + 1]);
    merges[i] = merge != nullptr ? *merge : kNoMerge;
  };
  for (size_t i = 0; i + 1 < size; ++i) look_up(i);
  while (size > 1) {
    const Merge* best =
        std::min_element(merges, merges + size - 1, [](const Merge& a, const Merge& b) { return a.rank < b.rank; });
    if (best->result < 0) break;
    const size_t at = static_cast<size_t>(best - merges);
    (*ids)[at] = best->result;
    std::copy(ids->begin() + static_cast<ptrdiff_t>(at) + 2, ids->begin() + static_cast<ptrdiff_t>(size),
              ids->begin() + static_cast<ptrdiff_t>(at) + 1);
    std::copy(merges + at + 1, merges + size - 1, merges + at);
    --size;
    if (at > 0) look_up(at - 1);
    if (at + 1 < size) look_up(at);
  }
  ids->resize(size);
}

void MergeTable::ApplyLong(std::vector<int32_t>* ids) const {
  constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();
  constexpr int32_t kGone = -1;
  struct Links {
    uint32_t previous, next;
  };
  struct Candidate {
    int32_t rank;
    uint32_t at;
    int32_t result;
    bool operator>(const Candidate& o) const { return std::tie(rank, at) > std::tie(o.rank, o.at); }
  };
  const uint32_t size = static_cast<uint32_t>(ids->size());
  std::vector<Links> links(size);
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto offer = [&](uint32_t at) {
    if (at == kNone || links[at].next == kNone) return;
    const Merge* merge = Find((*ids)[at], (*ids)[links[at].next]);
    if (merge != nullptr) queue.push({merge->rank, at, merge->result});
  };
  for (uint32_t i = 0; i < size; ++i) links[i] = {i == 0 ? kNone : i - 1, i + 1 == size ? kNone : i + 1};
  for (uint32_t i = 0; i < size; ++i) offer(i);
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    const uint32_t next = (*ids)[top.at] == kGone ? kNone : links[top.at].next;
    if (next == kNone) continue;
    const Merge* merge = Find((*ids)[top.at], (*ids)[next]);
    // A neighbour has changed since this was offered; what the pair is now was offered then.
    if (merge == nullptr || merge->result != top.result || merge->rank != top.rank) continue;
    (*ids)[top.at] = merge->result;
    (*ids)[next] = kGone;
    links[top.at].next = links[next].next;
    if (links[next].next != kNone) links[links[next].next].previous = top.at;
    offer(links[top.at].previous);
    offer(top.at);
  }
  std::erase(*ids, kGone);
}

}  // namespace prehoc::reference
