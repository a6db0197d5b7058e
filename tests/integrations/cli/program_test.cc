// The program as a process: exit codes, signals, and two of them over one store.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <string>
#include <vector>

#include "tests/integrations/cli/cli_test_util.h"
#include "tests/integrations/cli/tiny_model.h"

namespace prehoc::cli {
namespace {

// A running `prehoc` with pipes on its outputs.
class Program {
 public:
  explicit Program(std::vector<std::string> args) {
    int out[2], err[2];
    if (pipe2(out, O_CLOEXEC) != 0 || pipe2(err, O_CLOEXEC) != 0) std::abort();
    fcntl(out[1], F_SETPIPE_SZ, 4096);  // a long answer waits for its reader: it cannot end before the test acts
    args.insert(args.begin(), PREHOC_PROGRAM);
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(out[1], STDOUT_FILENO);
      dup2(err[1], STDERR_FILENO);
      execv(argv[0], argv.data());
      _exit(127);
    }
    close(out[1]);
    close(err[1]);
    out_ = out[0];
    err_ = err[0];
  }
  ~Program() {
    if (pid_ > 0) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
    if (out_ >= 0) close(out_);
    close(err_);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  char FirstByte() {  // waits for it: the answer has begun, or the program has ended ('\0')
    char byte = '\0';
    return read(out_, &byte, 1) == 1 ? byte : '\0';
  }
  void Signal(int signal) { kill(pid_, signal); }
  void CloseOutput() { close(std::exchange(out_, -1)); }
  std::string Output() { return ReadAll(out_); }
  std::string Errors() { return ReadAll(err_); }
  int Wait() {
    int status = 0;
    waitpid(std::exchange(pid_, -1), &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  static std::string ReadAll(int fd) {
    std::string text;
    char piece[4096];
    for (ssize_t n; (n = read(fd, piece, sizeof piece)) > 0;) text.append(piece, static_cast<size_t>(n));
    return text;
  }
  pid_t pid_ = -1;
  int out_ = -1, err_ = -1;
};

class ProgramTest : public testing::Test {
 protected:
  void SetUp() override {
    WriteTinyModel(dir_.path() + "/model", 1);
    std::string text;
    for (int i = 0; i < 60; ++i) text += "And Adam lived an hundred and thirty years, and begat a son " + std::to_string(i) + ".\n";
    WriteFile(dir_.path() + "/document.txt", text);
  }
  std::vector<std::string> Answer(const std::string& max_new_tokens) const {
    return {"answer", "--model", dir_.path() + "/model", "--document", dir_.path() + "/document.txt", "--context", "600",
            "--store", dir_.path() + "/store", "--max-new-tokens", max_new_tokens, "--threads", "2", "--budget", "64",
            "--device-budget", "32MiB", "--host-budget", "32MiB", "--store-budget", "32MiB"};
  }
  TempDir dir_;
};

TEST_F(ProgramTest, AnswersAndExitsWithZero) {
  Program program(Answer("4"));
  EXPECT_NE(program.Output().find("time to first token"), std::string::npos);
  EXPECT_EQ(program.Errors(), "");
  EXPECT_EQ(program.Wait(), 0);
}

TEST_F(ProgramTest, AWrongCommandLineExitsWithTwo) {
  Program program({"answer", "--contxt", "5"});
  EXPECT_EQ(program.Output(), "");
  EXPECT_EQ(program.Errors(), "prehoc: error: unknown flag --contxt: did you mean --context?; see prehoc answer --help\n");
  EXPECT_EQ(program.Wait(), 2);
}

TEST_F(ProgramTest, PrintsItsVersion) {
  Program program({"--version"});
  EXPECT_TRUE(program.Output().starts_with("prehoc 0."));
  EXPECT_EQ(program.Wait(), 0);
}

TEST_F(ProgramTest, ControlCStopsAtATokenAndPrintsTheTable) {
  Program program(Answer("3000"));
  ASSERT_NE(program.FirstByte(), '\0') << program.Errors();
  program.Signal(SIGINT);
  EXPECT_NE(program.Output().find("interrupted"), std::string::npos);
  EXPECT_EQ(program.Wait(), 130);
  Program again(Answer("1"));
  EXPECT_NE(again.Output().find("512 restored from " + dir_.path() + "/store"), std::string::npos);
  EXPECT_EQ(again.Wait(), 0);
}

TEST_F(ProgramTest, AStoreInUseIsRefused) {
  Program first(Answer("3000"));
  ASSERT_NE(first.FirstByte(), '\0') << first.Errors();
  Program second(Answer("1"));
  EXPECT_NE(second.Errors().find("--store " + dir_.path() + "/store"), std::string::npos);
  EXPECT_EQ(second.Wait(), 1);
  first.Signal(SIGTERM);
  first.Output();
  EXPECT_EQ(first.Wait(), 143);
}

TEST_F(ProgramTest, AReaderThatGoesAwayEndsIt) {
  Program program(Answer("3000"));
  ASSERT_NE(program.FirstByte(), '\0') << program.Errors();
  program.CloseOutput();
  EXPECT_NE(program.Errors().find("standard output"), std::string::npos);
  EXPECT_EQ(program.Wait(), 1);
}

}  // namespace
}  // namespace prehoc::cli
