#include "transfer/store_survey.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "tests/support/chunk_data.h"

namespace prehoc {
namespace {

constexpr int32_t kLayers = 3;

// Records of prompts, made as a cache makes them: each chunk names the one before.
class SurveyTest : public ::testing::Test {
 protected:
  // The chunk `n`, after chunk `parent` (-1: the first), with all its layers.
  void Add(int n, int parent, int32_t index, uint64_t tenant = 1, bool branch = false) {
    const uint64_t before = parent < 0 ? 0 : ChainTag(TestKey(parent).chain);
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      records_.push_back({TestKey(n, layer), {.tenant = tenant, .parent = before, .chunk = index, .branch = branch}, static_cast<uint64_t>(n), false});
    }
  }
  SurveyRecord& At(int n, int32_t layer) {
    for (SurveyRecord& record : records_) {
      if (record.key == TestKey(n, layer)) return record;
    }
    std::abort();
  }
  Unreachable Why(const StoreSurvey& survey, int n, int32_t layer = 0) {
    return survey.why[static_cast<size_t>(&At(n, layer) - records_.data())];
  }
  std::vector<SurveyRecord> records_;
};

TEST_F(SurveyTest, AnEmptyStoreHasNothing) {
  const StoreSurvey survey = SurveyRecords({}, kLayers);
  EXPECT_TRUE(survey.why.empty());
  EXPECT_TRUE(survey.tenants.empty());
}

TEST_F(SurveyTest, CountsPromptsByWhereTheyEnd) {
  // Two prompts share their first two chunks; a third stands alone; another tenant has one.
  Add(4, 2, 2);
  Add(1, -1, 0);
  Add(2, 1, 1);
  Add(3, 2, 2);
  Add(5, -1, 0);
  Add(6, -1, 0, /*tenant=*/9);
  const StoreSurvey survey = SurveyRecords(records_, kLayers);
  EXPECT_EQ(survey.Count(Unreachable::kNo), static_cast<int64_t>(records_.size()));
  ASSERT_EQ(survey.tenants.size(), 2u);
  EXPECT_EQ(survey.tenants[0].tag, 1u);
  EXPECT_EQ(survey.tenants[0].prefixes, 3);
  EXPECT_EQ(survey.tenants[0].longest_chunks, 3);
  EXPECT_EQ(survey.tenants[0].chunks, 5);
  EXPECT_EQ(survey.tenants[0].records, 5 * kLayers);
  EXPECT_EQ(survey.tenants[0].oldest_segment, 1u);
  EXPECT_EQ(survey.tenants[0].newest_segment, 5u);
  EXPECT_EQ(survey.tenants[1].tag, 9u);
  EXPECT_EQ(survey.tenants[1].prefixes, 1);
}

TEST_F(SurveyTest, WhatFollowsAGapCannotBeReached) {
  for (int n = 1; n <= 4; ++n) Add(n, n - 1 == 0 ? -1 : n - 1, n - 1);
  At(2, 1).damaged = true;
  const StoreSurvey survey = SurveyRecords(records_, kLayers);
  EXPECT_EQ(Why(survey, 1), Unreachable::kNo);
  EXPECT_EQ(Why(survey, 2, 1), Unreachable::kDamaged);
  EXPECT_EQ(Why(survey, 2, 0), Unreachable::kGap);
  EXPECT_EQ(Why(survey, 3), Unreachable::kNoParent);
  EXPECT_EQ(Why(survey, 4), Unreachable::kNoParent);
  EXPECT_EQ(survey.tenants.at(0).prefixes, 1);
  EXPECT_EQ(survey.tenants.at(0).longest_chunks, 1);
}

TEST_F(SurveyTest, AnswersAndWhatFollowsThemBelongToTheirRun) {
  Add(1, -1, 0);
  Add(2, 1, 1, 1, /*branch=*/true);
  Add(3, 2, 2, 1, /*branch=*/true);
  const StoreSurvey survey = SurveyRecords(records_, kLayers);
  EXPECT_EQ(survey.Count(Unreachable::kBranch), 2 * kLayers);
  EXPECT_EQ(survey.tenants.at(0).prefixes, 1);
}

TEST_F(SurveyTest, AParentOfAnotherTenantOrPlaceIsNone) {
  Add(1, -1, 0);
  Add(2, 1, 1, /*tenant=*/2);
  Add(3, 1, 2);  // says that it is the third, after the first
  Add(4, 5, 1);  // a parent that is not there
  const StoreSurvey survey = SurveyRecords(records_, kLayers);
  for (const int n : {2, 3, 4}) EXPECT_EQ(Why(survey, n), Unreachable::kNoParent) << n;
}

TEST_F(SurveyTest, WithoutALayoutTheLargestLayerCounts) {
  Add(1, -1, 0);
  Add(2, -1, 0);
  std::reverse(records_.begin(), records_.end());
  records_.erase(records_.begin());  // the last layer of chunk 2
  const StoreSurvey survey = SurveyRecords(records_, 0);
  EXPECT_EQ(Why(survey, 1), Unreachable::kNo);
  EXPECT_EQ(Why(survey, 2), Unreachable::kGap);
}

TEST_F(SurveyTest, HostileLinksEnd) {
  Add(1, 1, 5);  // its own parent
  Add(2, 3, 7);
  Add(3, 2, 7);  // each other's
  Add(4, 4, INT32_MAX);
  const StoreSurvey survey = SurveyRecords(records_, kLayers);
  EXPECT_EQ(survey.Count(Unreachable::kNoParent), 4 * kLayers);
}

TEST(LayoutNumbersTest, AreReadFromTheName) {
  EXPECT_EQ(ParseLayoutNumbers("rows-kv/l30/h3/d64/p16/c256").layers, 30);
  EXPECT_EQ(ParseLayoutNumbers("rows-kv/l30/h3/d64/p16/c256").chunk_tokens, 256);
  for (const char* odd : {"", "/", "l", "lx/c", "rows/l-3", "l99999999999", "//l//c"}) {
    EXPECT_EQ(ParseLayoutNumbers(odd).layers, 0) << odd;
    EXPECT_EQ(ParseLayoutNumbers(odd).chunk_tokens, 0) << odd;
  }
}

}  // namespace
}  // namespace prehoc
