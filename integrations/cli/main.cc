// The command `prehoc`: reads the environment and the command line, and hands over.
#include <csignal>
#include <iostream>
#include <string>
#include <vector>

#include "base/clock.h"
#include "integrations/cli/answer.h"
#include "integrations/cli/doctor.h"
#include "integrations/cli/environment.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/fidelity.h"
#include "integrations/cli/inspect.h"
#include "integrations/cli/options.h"
#include "integrations/cli/torture.h"

int main(int argc, char** argv) {
  using namespace prehoc;
  using namespace prehoc::cli;
  std::signal(SIGPIPE, SIG_IGN);  // a reader that went away shows as a failed write
  const std::vector<std::string> args(argv + 1, argv + argc);
  const Result<Command> command = ParseCommandLine(args);
  if (!command.ok()) {
    std::cerr << "prehoc: error: " << command.status().message() << std::endl;
    return ExitCodeOf(command.status());
  }
  const Environment environment = Environment::OfProcess();
  switch (command->kind) {
    case CommandKind::kPrintText: std::cout << command->text << std::flush; return std::cout ? kExitOk : kExitRuntime;
    case CommandKind::kAnswer: return RunAnswer(command->answer, environment, std::cout, std::cerr, SteadyClock::Get());
    case CommandKind::kFidelity: return RunFidelity(command->fidelity, environment, std::cout, std::cerr, SteadyClock::Get());
    case CommandKind::kInspect: return RunInspect(command->inspect, environment, std::cout, std::cerr, SteadyClock::Get());
    case CommandKind::kTorture: return RunTortureCommand(command->torture, environment, std::cout, std::cerr, SteadyClock::Get());
    case CommandKind::kDoctor: return RunDoctor(command->doctor, environment, std::cout, std::cerr, SteadyClock::Get());
  }
  return kExitRuntime;
}
