// Facts hidden in a document and asked for: prompts whose right continuation is known.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"
#include "integrations/cli/fidelity_plan.h"
#include "integrations/reference/tokenizer/tokenizer.h"

namespace prehoc::cli {

struct TaskRequest {
  FidelityTask task = FidelityTask::kNeedle;
  int64_t set = 0;                    // which of the contexts; each has facts of its own
  uint64_t seed = 0;
  std::span<const int32_t> document;  // tokens
  int64_t context = 0;                // tokens of the prompt, facts included
};

// The prompt is document with facts; the stream is questions and answers, to be fed token by token. An answer's value is
// found if every one of its tokens is the most likely one where it stands.
struct TaskContext {
  struct Item {
    int64_t begin = 0, end = 0;       // the value: [begin, end) of the stream
    double depth = 0;                 // of the fact, as a share of the prompt
    std::string kind;                 // "number", "password", "city"
  };
  std::vector<int32_t> prompt, stream;
  std::vector<Item> items;
};

//   needle      8 facts about different things, at even depths; each is asked for
//   multikey    32 numbers whose names share their words; 8 are asked for
//   multivalue  3 things of which the text tells number, password and city at different depths; each is asked for
//   extract     16 numbers over the whole text; one question asks for all of them, in order
// The sentences are those that the model smollm2-128k was trained on. kInvalid: the context is too short for the facts
// (names --context and what would do), or the document is shorter than the context.
Result<TaskContext> BuildTask(const reference::Tokenizer& tokenizer, const TaskRequest& request);

}  // namespace prehoc::cli
