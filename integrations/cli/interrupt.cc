#include "integrations/cli/interrupt.h"

#include <signal.h>

#include <atomic>

namespace prehoc::cli {
namespace {
std::atomic<int> g_signal{0};
static_assert(std::atomic<int>::is_always_lock_free, "set from a signal handler");
struct sigaction g_before_int, g_before_term;

void Remember(int signal) { g_signal.store(signal, std::memory_order_relaxed); }
}  // namespace

InterruptGuard::InterruptGuard() {
  g_signal.store(0, std::memory_order_relaxed);
  struct sigaction action = {};
  action.sa_handler = Remember;
  action.sa_flags = SA_RESETHAND | SA_RESTART;
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, &g_before_int);
  sigaction(SIGTERM, &action, &g_before_term);
}

InterruptGuard::~InterruptGuard() {
  sigaction(SIGINT, &g_before_int, nullptr);
  sigaction(SIGTERM, &g_before_term, nullptr);
}

bool InterruptGuard::Requested() { return g_signal.load(std::memory_order_relaxed) != 0; }
int InterruptGuard::ExitCode() { return 128 + g_signal.load(std::memory_order_relaxed); }

}  // namespace prehoc::cli
