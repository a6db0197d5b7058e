// Finds the tokens that are matched in text before anything else cuts it: special and user-defined ones.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace prehoc::reference {

// A set of patterns, of which the leftmost and then longest match wins.
class AddedTokenMatcher {
 public:
  struct Pattern {
    std::string text;  // not empty
    int32_t id = -1;
    bool special = false, lstrip = false, rstrip = false;
  };
  struct Match {
    size_t begin, end;  // with the whitespace that the pattern takes along
    int32_t id;
  };

  AddedTokenMatcher() { root_.fill(kNone); }
  // A pattern added twice keeps its first id.
  void Add(Pattern pattern);

  // The next match at or after `from`, with nothing taken before `from`. Special patterns are passed over
  // as text unless `parse_special`. Requires valid UTF-8 and `from` at a character.
  std::optional<Match> Next(std::string_view text, size_t from, bool parse_special) const;

 private:
  static constexpr int32_t kNone = -1;
  struct Node {
    char byte = 0;
    int32_t child = kNone, sibling = kNone, pattern = kNone;
  };
  int32_t FindOrAddChild(int32_t* head, char byte);
  const Pattern* LongestAt(std::string_view text) const;

  std::vector<Pattern> patterns_;
  std::vector<Node> nodes_;
  std::array<int32_t, 256> root_;  // node per first byte
};

}  // namespace prehoc::reference
