#include "transfer/store_survey.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <set>

namespace prehoc {
namespace {

// One chunk: the records of all layers under one chain hash.
struct Chunk {
  ChunkOrigin origin;
  std::set<int32_t> layers;  // that are whole
  std::vector<size_t> records;
  bool children = false;     // that can be used
};
using Chunks = std::map<std::array<uint8_t, 32>, Chunk>;

// Whether each chunk can be used; parents come first.
class Reach {
 public:
  Reach(Chunks* chunks, int32_t layers) : layers_(layers) {
    for (auto& [chain, chunk] : *chunks) {
      by_tag_[ChainTag(chain)] = &chunk;
      order_.push_back({&chunk, ChainTag(chain)});
    }
    std::stable_sort(order_.begin(), order_.end(), [](const auto& a, const auto& b) { return a.first->origin.chunk < b.first->origin.chunk; });
    for (const auto& [chunk, tag] : order_) why_[tag] = Judge(*chunk);
  }
  Unreachable Why(uint64_t tag) const { return why_.at(tag); }

 private:
  Unreachable Judge(const Chunk& chunk) {
    if (chunk.layers.empty()) return Unreachable::kGap;
    if (chunk.origin.branch) return Unreachable::kBranch;
    if (static_cast<int32_t>(chunk.layers.size()) < layers_) return Unreachable::kGap;
    if (chunk.origin.chunk == 0) return Unreachable::kNo;
    const auto parent = by_tag_.find(chunk.origin.parent);
    if (parent == by_tag_.end()) return Unreachable::kNoParent;
    const ChunkOrigin& before = parent->second->origin;
    const bool follows = int64_t{before.chunk} + 1 == chunk.origin.chunk && before.tenant == chunk.origin.tenant;
    // Sorted by number, so the parent was judged before; one with a higher number is none.
    const auto judged = why_.find(parent->first);
    if (!follows || judged == why_.end() || judged->second != Unreachable::kNo) return Unreachable::kNoParent;
    parent->second->children = true;
    return Unreachable::kNo;
  }

  const int32_t layers_;
  std::map<uint64_t, Chunk*> by_tag_;
  std::map<uint64_t, Unreachable> why_;
  std::vector<std::pair<Chunk*, uint64_t>> order_;
};

}  // namespace

LayoutNumbers ParseLayoutNumbers(std::string_view layout) {
  LayoutNumbers numbers;
  while (!layout.empty()) {
    const std::string_view part = layout.substr(0, layout.find('/'));
    layout.remove_prefix(std::min(layout.size(), part.size() + 1));
    if (part.size() < 2) continue;
    int32_t value = 0;
    const auto [end, error] = std::from_chars(part.data() + 1, part.data() + part.size(), value);
    if (error != std::errc() || end != part.data() + part.size() || value < 0) continue;
    if (part[0] == 'l') numbers.layers = value;
    if (part[0] == 'c') numbers.chunk_tokens = value;
  }
  return numbers;
}

const char* UnreachableName(Unreachable why) {
  switch (why) {
    case Unreachable::kNo: return "usable";
    case Unreachable::kDamaged: return "damaged";
    case Unreachable::kBranch: return "of an answer";
    case Unreachable::kGap: return "chunk not whole";
    case Unreachable::kNoParent: return "no chunk before it";
  }
  return "?";
}

int64_t StoreSurvey::Count(Unreachable which) const { return std::count(why.begin(), why.end(), which); }

StoreSurvey SurveyRecords(const std::vector<SurveyRecord>& records, int32_t layers) {
  Chunks chunks;
  StoreSurvey survey;
  survey.why.assign(records.size(), Unreachable::kDamaged);
  if (layers == 0) {
    for (const SurveyRecord& record : records) layers = std::max(layers, std::min(record.key.layer, INT32_MAX - 1) + 1);
  }
  for (size_t i = 0; i < records.size(); ++i) {
    const SurveyRecord& record = records[i];
    if (record.damaged) continue;
    Chunk& chunk = chunks[record.key.chain];
    chunk.origin = record.origin;
    chunk.layers.insert(record.key.layer);
    chunk.records.push_back(i);
  }
  const Reach reach(&chunks, layers);
  std::map<uint64_t, SurveyTenant> tenants;
  for (const auto& [chain, chunk] : chunks) {
    const Unreachable why = reach.Why(ChainTag(chain));
    for (const size_t i : chunk.records) survey.why[i] = why;
    if (why != Unreachable::kNo) continue;
    SurveyTenant& tenant = tenants[chunk.origin.tenant];
    tenant.tag = chunk.origin.tenant;
    ++tenant.chunks;
    tenant.records += static_cast<int64_t>(chunk.records.size());
    tenant.longest_chunks = std::max(tenant.longest_chunks, int64_t{chunk.origin.chunk} + 1);
    tenant.prefixes += chunk.children ? 0 : 1;
    for (const size_t i : chunk.records) {
      const uint64_t segment = records[i].segment;
      if (tenant.oldest_segment == 0 || segment < tenant.oldest_segment) tenant.oldest_segment = segment;
      tenant.newest_segment = std::max(tenant.newest_segment, segment);
    }
  }
  for (const auto& [tag, tenant] : tenants) survey.tenants.push_back(tenant);
  return survey;
}

}  // namespace prehoc
