#include "base/status.h"

#include <memory>
#include <set>
#include <sstream>
#include <vector>

#include "base/result.h"
#include "tests/support/status_matchers.h"

namespace prehoc {
namespace {

TEST(StatusTest, OkIsTheDefaultAndHasNoMessage) {
  const Status status;
  EXPECT_TRUE(status.ok());
  EXPECT_EQ(status.code(), StatusCode::kOk);
  EXPECT_EQ(status.message(), "");
  EXPECT_EQ(status.ToString(), "ok");
  EXPECT_TRUE(OkStatus().ok());
}

TEST(StatusTest, CarriesCodeAndMessage) {
  const Status status(StatusCode::kCorrupt, "chunk 12");
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(status.code(), StatusCode::kCorrupt);
  EXPECT_EQ(status.ToString(), "corrupt: chunk 12");
  std::ostringstream out;
  out << status;
  EXPECT_EQ(out.str(), "corrupt: chunk 12");
}

TEST(StatusTest, ContextGoesBeforeTheMessage) {
  const Status status(StatusCode::kIoError, "no such disk");
  EXPECT_EQ(status.WithContext("store /a").WithContext("open").ToString(), "I/O error: open: store /a: no such disk");
  EXPECT_TRUE(Status().WithContext("anything").ok());
}

TEST(StatusTest, CopiesShareAndMovesLeaveSomethingValid) {
  Status a(StatusCode::kBusy, "later");
  const Status b = a;
  const Status c = std::move(a);
  EXPECT_EQ(b.ToString(), c.ToString());
  a = Status();
  EXPECT_TRUE(a.ok());
}

TEST(StatusTest, EveryCodeHasItsOwnName) {
  std::set<std::string_view> names;
  for (int code = 0; code <= static_cast<int>(StatusCode::kUnsupported); ++code) {
    names.insert(StatusCodeName(static_cast<StatusCode>(code)));
  }
  EXPECT_EQ(names.size(), static_cast<size_t>(StatusCode::kUnsupported) + 1);
  EXPECT_EQ(names.count("unknown"), 0u);
}

TEST(StatusDeathTest, AnErrorNeedsACode) {
  EXPECT_DEATH(Status(StatusCode::kOk, "fine").IgnoreError(), "code != StatusCode::kOk");
}

Status Fail(bool fail) {
  if (fail) return {StatusCode::kStale, "changed"};
  return {};
}
Status Propagate(bool fail, int* after) {
  PREHOC_RETURN_IF_ERROR(Fail(fail));
  ++*after;
  return {};
}

TEST(StatusTest, ReturnIfErrorReturnsErrorsOnly) {
  int after = 0;
  EXPECT_STATUS(StatusCode::kStale, "changed", Propagate(true, &after));
  EXPECT_EQ(after, 0);
  EXPECT_OK(Propagate(false, &after));
  EXPECT_EQ(after, 1);
}

// --- Result ---

TEST(ResultTest, HoldsAValueOrTheReason) {
  const Result<int> good = 7;
  EXPECT_TRUE(good.ok());
  EXPECT_EQ(*good, 7);
  EXPECT_TRUE(good.status().ok());
  const Result<int> bad = {StatusCode::kNotFound, "no such number"};
  EXPECT_FALSE(bad.ok());
  EXPECT_STATUS(StatusCode::kNotFound, "no such number", bad);
}

TEST(ResultTest, HoldsWhatOnlyMoves) {
  Result<std::unique_ptr<int>> result = std::make_unique<int>(3);
  EXPECT_EQ(**result, 3);
  std::unique_ptr<int> taken = std::move(result).value();
  EXPECT_EQ(*taken, 3);
  Result<std::vector<int>> list = std::vector<int>{1, 2};
  EXPECT_EQ(list->size(), 2u);
}

Result<std::unique_ptr<int>> Make(bool fail) {
  if (fail) return {StatusCode::kOutOfSpace, "none left"};
  return std::make_unique<int>(5);
}
Result<int> Use(bool fail) {
  PREHOC_ASSIGN_OR_RETURN(const std::unique_ptr<int> first, Make(false));
  PREHOC_ASSIGN_OR_RETURN(const std::unique_ptr<int> second, Make(fail));
  return *first + *second;
}

TEST(ResultTest, AssignOrReturnTakesTheValueOrLeaves) {
  EXPECT_EQ(Use(false).value(), 10);
  EXPECT_STATUS(StatusCode::kOutOfSpace, "none left", Use(true));
}

TEST(ResultDeathTest, AnErrorHasNoValueAndAnOkStatusIsNoError) {
  Result<int> bad = {StatusCode::kBusy, "later"};
  EXPECT_DEATH(static_cast<void>(bad.value()), "has_value");
  EXPECT_DEATH(static_cast<void>(Result<int>(Status())), "ok");
}

}  // namespace
}  // namespace prehoc
