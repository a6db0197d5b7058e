// The answer as it comes: whole characters only, at once.
#pragma once
#include <ostream>
#include <string>
#include <string_view>

#include "base/status.h"
#include "integrations/cli/utf8.h"

namespace prehoc::cli {

class TokenPrinter {
 public:
  TokenPrinter(std::ostream& out, bool terminal) : out_(out), stream_(terminal) {}

  // Blanks before the answer are left out: some tokenizers put one in front of every text.
  // kIoError if nobody reads `out` any more.
  Status Print(std::string_view token_bytes) { return Write(stream_.Feed(token_bytes)); }
  // What is unfinished, and the end of the line.
  Status Finish() {
    const Status status = Write(stream_.Finish());
    out_ << std::endl;
    return status;
  }
  const std::string& text() const { return text_; }  // what was printed, without the end of the line

 private:
  Status Write(std::string piece) {
    if (text_.empty()) piece.erase(0, piece.find_first_not_of(' '));
    text_ += piece;
    out_ << piece << std::flush;
    return out_ ? Status() : Status(StatusCode::kIoError, "standard output: nobody reads it any more");
  }
  std::ostream& out_;
  Utf8Stream stream_;
  std::string text_;
};

}  // namespace prehoc::cli
