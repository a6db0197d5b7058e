#include "integrations/cli/text_table.h"

#include <gtest/gtest.h>

namespace prehoc::cli {
namespace {

TEST(TextTableTest, LinesUpCharactersNotBytes) {
  TextTable table({"", "tc", "dense"});
  table.Add({"na\xc3\xafve", "1", "22,222"});
  table.Add({"b", "333"});
  EXPECT_EQ(table.ToString(),
            "        tc   dense\n"
            "na\xc3\xafve    1  22,222\n"
            "b      333\n");
}

}  // namespace
}  // namespace prehoc::cli
