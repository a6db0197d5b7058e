#include "integrations/cli/token_printer.h"

#include <gtest/gtest.h>

#include <sstream>

#include "tests/support/status_matchers.h"

namespace prehoc::cli {
namespace {

TEST(TokenPrinterTest, StreamsWholeCharactersWithoutLeadingBlanks) {
  std::ostringstream out;
  TokenPrinter printer(out, false);
  EXPECT_OK(printer.Print(" "));
  EXPECT_OK(printer.Print(" Ca"));
  EXPECT_EQ(out.str(), "Ca");
  EXPECT_OK(printer.Print(" \xc3"));
  EXPECT_EQ(out.str(), "Ca ");
  EXPECT_OK(printer.Print("\xa9"));
  EXPECT_OK(printer.Finish());
  EXPECT_EQ(out.str(), "Ca \xc3\xa9\n");
  EXPECT_EQ(printer.text(), "Ca \xc3\xa9");
}

TEST(TokenPrinterTest, AnUnfinishedCharacterIsReplacedAtTheEnd) {
  std::ostringstream out;
  TokenPrinter printer(out, false);
  EXPECT_OK(printer.Print("a\xf0\x9f"));
  EXPECT_OK(printer.Finish());
  EXPECT_EQ(out.str(), "a\xef\xbf\xbd\n");
}

TEST(TokenPrinterTest, SaysWhenNobodyReads) {
  std::ostringstream out;
  TokenPrinter printer(out, false);
  out.setstate(std::ios::badbit);
  EXPECT_STATUS(StatusCode::kIoError, "standard output", printer.Print("a"));
}

}  // namespace
}  // namespace prehoc::cli
