// Columns that line up: the first to the left, the others to the right.
#pragma once
#include <string>
#include <utility>
#include <vector>

namespace prehoc::cli {

class TextTable {
 public:
  explicit TextTable(std::vector<std::string> header) : rows_{std::move(header)} {}
  void Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }  // as many cells as the header, or fewer
  std::string ToString() const;  // one line a row, no blanks at its end

 private:
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace prehoc::cli
