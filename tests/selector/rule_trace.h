// Rules carried out to the letter, over logits: what selector.h promises to those who apply it. Written from the
// contracts of StepRule and ResidencyRule alone, so that rules and reference.h can be held against each other.
#pragma once
#include <deque>
#include <memory>
#include <vector>

#include "selector/borrow_map.h"
#include "selector/reference.h"
#include "selector/selector.h"

namespace prehoc {

class RuleTrace {
 public:
  RuleTrace(const SelectorOptions& options, const ReferenceShape& shape, bool all_resident);
  ReferenceDecision Step(const ReferenceInput& in);

 private:
  using Mask = std::vector<bool>;  // [n]
  struct Head {                    // who chooses together
    int32_t first = 0, count = 0, kv_head = 0;
    int64_t chosen_at = -1;        // step; -1: never
    int32_t local_left = 0;
    std::vector<float> anchor, anchor_pre;
    std::vector<int32_t> middle;
    std::vector<double> lse_dropped;
    std::deque<std::vector<double>> pool;
    Mask resident, coming;  // positions beyond their size are newer, and resident
    int64_t due = -1;
  };

  Mask Sight() const;
  Mask Base(int32_t local_left) const;  // sinks and local
  double Z(int32_t head, int32_t i) const;
  double Rankable(int32_t head, int32_t i) const;
  double Lse(int32_t head, const Mask& of, double errors = 0) const;
  double Cosine(const Head& head, int32_t h) const;
  double Gate(const Head& head) const;
  double Score(const Head& head, int32_t i, const std::vector<double>& lse) const;
  std::vector<double> Bounds(const Head& head, const Mask& kept) const;
  Mask Inherited(const Head& head) const;
  bool Refresh(Head* head);
  bool Resident(const Head& head, int32_t i) const;
  Mask Choose(Head* head, bool* retrieval, Mask* plain) const;
  void Keep(Head* head, const Mask& chosen) const;
  void MapHeads();

  std::unique_ptr<Selector> selector_;
  const ReferenceShape shape_;
  const bool all_resident_;
  std::vector<Head> heads_;
  BorrowMap source_;  // empty: nobody borrows
  // Of the step under way.
  StepRule rule_;
  const ReferenceInput* in_ = nullptr;
  int32_t n_ = 0;
};

}  // namespace prehoc
