// What the command takes from the process's environment; read once, in main().
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace prehoc::cli {

struct Environment {
  std::string cache_dir;      // $XDG_CACHE_HOME/prehoc, else $HOME/.cache/prehoc; empty if neither is set
  std::vector<std::string> adapter_dirs;  // where adapters of named models are looked for, in this order
  uint64_t memory_bytes = 0;  // what this process may use: RAM, or the control group's limit if that is less; 0 = unknown
  bool stdout_terminal = false, stderr_terminal = false;

  std::string models_dir() const { return cache_dir + "/models"; }
  std::string documents_dir() const { return cache_dir + "/documents"; }

  static Environment OfProcess();
};

}  // namespace prehoc::cli
