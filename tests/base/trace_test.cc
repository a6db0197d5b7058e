#include "base/trace.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace prehoc {
namespace {

class Recorder final : public Tracer {
 public:
  using Tracer::Tracer;
  void OnSpan(const TraceSpan& span) override { spans.push_back(span); }
  std::vector<TraceSpan> spans;
};

TEST(TraceTest, ASpanLastsAsLongAsItsScopeAndInnerOnesEndFirst) {
  ManualClock clock(100);
  Recorder recorder(&clock);
  {
    TraceScope outer(&recorder, "outer");
    clock.Advance(5);
    {
      TraceScope inner(&recorder, "inner");
      inner.Say("layer", 3).Say("bytes", 4096);
      clock.Advance(7);
    }
    clock.Advance(1);
  }
  ASSERT_EQ(recorder.spans.size(), 2u);
  const TraceSpan& inner = recorder.spans[0];
  EXPECT_EQ(std::string(inner.name), "inner");
  EXPECT_EQ(inner.begin_nanos, 105);
  EXPECT_EQ(inner.end_nanos, 112);
  ASSERT_EQ(inner.num_args, 2u);
  EXPECT_EQ(std::string(inner.args[1].name), "bytes");
  EXPECT_EQ(inner.args[1].value, 4096);
  const TraceSpan& outer = recorder.spans[1];
  EXPECT_EQ(outer.begin_nanos, 100);
  EXPECT_EQ(outer.end_nanos, 113);
  EXPECT_EQ(outer.num_args, 0u);
}

TEST(TraceTest, WithoutATracerNothingHappens) {
  TraceScope scope(nullptr, "nobody looks");
  scope.Say("layer", 1);
}

TEST(TraceTest, MoreThanFitsIsLeftOut) {
  ManualClock clock;
  Recorder recorder(&clock);
  {
    TraceScope scope(&recorder, "talkative");
    scope.Say("a", 1).Say("b", 2).Say("c", 3).Say("d", 4).Say("e", 5);
  }
  ASSERT_EQ(recorder.spans.at(0).num_args, TraceSpan::kMaxArgs);
  EXPECT_EQ(recorder.spans[0].args[3].value, 4);
}

}  // namespace
}  // namespace prehoc
