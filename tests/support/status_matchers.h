// EXPECT_OK, ASSERT_OK, EXPECT_STATUS(code, text, expr): a Status or Result, shown with its message when it is not as wanted.
#pragma once
#include <gtest/gtest.h>

#include <string_view>

#include "base/result.h"
#include "base/status.h"

namespace prehoc {

inline const Status& StatusOf(const Status& status) { return status; }
template <class T>
const Status& StatusOf(const Result<T>& result) {
  return result.status();
}

template <class T>
testing::AssertionResult IsOk(const T& outcome) {
  if (StatusOf(outcome).ok()) return testing::AssertionSuccess();
  return testing::AssertionFailure() << StatusOf(outcome).ToString();
}

// The code is `code` and the message contains `text`.
template <class T>
testing::AssertionResult HasStatus(const T& outcome, StatusCode code, std::string_view text) {
  const Status& status = StatusOf(outcome);
  if (status.code() == code && status.message().find(text) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "got \"" << status.ToString() << "\", want " << StatusCodeName(code)
                                     << " with \"" << text << "\"";
}

}  // namespace prehoc

#define EXPECT_OK(expr) EXPECT_TRUE(::prehoc::IsOk(expr))
#define ASSERT_OK(expr) ASSERT_TRUE(::prehoc::IsOk(expr))
#define EXPECT_STATUS(code, text, expr) EXPECT_TRUE(::prehoc::HasStatus(expr, code, text))
