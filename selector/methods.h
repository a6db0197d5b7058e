// The methods behind Selector::Create(), and what they share. Internal to selector/.
#pragma once
#include <memory>
#include <string>

#include "selector/selector.h"

namespace prehoc::selector_internal {

std::unique_ptr<Selector> MakeDense(const SelectorOptions& options);
std::unique_ptr<Selector> MakeWindow(const SelectorOptions& options);
std::unique_ptr<Selector> MakeOracle(const SelectorOptions& options);
std::unique_ptr<Selector> MakeCis(const SelectorOptions& options);
std::unique_ptr<Selector> MakePsaw(const SelectorOptions& options);
std::unique_ptr<Selector> MakeEtf(const SelectorOptions& options);
std::unique_ptr<Selector> MakeCpe(const SelectorOptions& options);
std::unique_ptr<Selector> MakeSharedCandidates(const SelectorOptions& options);
std::unique_ptr<Selector> MakeTwoClock(const SelectorOptions& options);
std::unique_ptr<Selector> MakeQuest(const SelectorOptions& options);
std::unique_ptr<Selector> MakeHShare(const SelectorOptions& options);

// Rules as DoRule() returns them: Selector::Rule() adds sinks, local and what follows from them.
StepRule AttendAll();
StepRule ChooseK(const SelectorOptions& options, Scorer scorer, int64_t n);

// CIS's rule without a window, for cis and cpe.
StepRule CisRule(const SelectorOptions& options, const StepContext& context);

// floor((1 - c^x) n) with x = (l - l_s) / (N - l_s); 0 before l_s. l = layer + 1, or layer with base_one false.
int64_t CutByDepth(const DepthOptions& depth, bool base_one, int32_t layer, int32_t layers, int64_t n);

// PSAW's edge P_l(n) with its guard P <= n - local.
int64_t PsawStart(const SelectorOptions& options, int32_t layer, int32_t layers, int64_t n);
// Moves the lower edge of `rule` to P_l(n), if PSAW is on in decode.
void ApplyPsaw(const SelectorOptions& options, const StepContext& context, StepRule* rule);
void ApplyPsaw(const SelectorOptions& options, PrefillRule* rule);
std::string PsawTag(const SelectorOptions& options);

// E_l; `extent` is the prompt or the end of the chunk.
void ApplyEtf(const SelectorOptions& options, int32_t layer, int32_t layers, int64_t prompt_tokens, int64_t chunk_end,
              PrefillRule* rule);
std::string EtfTag(const SelectorOptions& options, int64_t prompt_tokens);

}  // namespace prehoc::selector_internal
