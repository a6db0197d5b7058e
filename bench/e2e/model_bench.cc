// What does a user wait for? Prefill, decode at depth, and a prefix restored from disk, with the real model on real text.
//
//   model_bench --model=FILE.gguf --document=FILE.txt --dir=EMPTY_DIR [--threads=2] [Google Benchmark flags]
//
// Decode feeds the document's own next tokens, so every selector sees the same text. `ms_attention` is what the cache took
// of a token: append, gate, scan, choose, fetch, attend and slow clock, all billed. `dense` is the selector that attends to
// everything, resident; `tc` is the default (two clocks, budget 1/16, tau 0.8). `tiers` runs it in 48 MiB of device and
// 64 MiB of host memory with the disk tier in --dir. Audits are off. Restored bytes are read with direct I/O and verified.
#include <benchmark/benchmark.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "base/units.h"
#include "bench/or_exit.h"
#include "integrations/cli/session.h"
#include "integrations/reference/model.h"
#include "integrations/reference/tokenizer/tokenizer.h"

namespace prehoc::cli {
namespace {

struct World {
  std::string dir;
  int threads = 2;
  std::shared_ptr<const reference::Model> model;
  std::vector<int32_t> tokens;  // of the document
};
World& TheWorld() {
  static World world;
  return world;
}

SessionOptions Options(const std::string& selector, int64_t max_tokens, bool tiers) {
  SessionOptions options;
  const size_t comma = selector.find(',');
  options.selector.kind = OrExit(ParseSelectorKind(selector.substr(0, comma)));
  if (comma != std::string::npos) {
    const size_t equals = selector.find('=');
    OrExit(options.selector.Set(selector.substr(comma + 1, equals - comma - 1), selector.substr(equals + 1)));
  }
  options.device_budget = tiers ? 48 * kMiB : kGiB;
  options.host_budget = tiers ? 64 * kMiB : kGiB;
  options.store = TheWorld().dir + "/store";
  options.store_budget = 2 * kGiB;
  options.audit_every = 0;
  options.max_tokens = max_tokens;
  options.prompt_tokens = max_tokens;
  options.threads = TheWorld().threads;
  return options;
}

std::span<const int32_t> Prompt(int64_t count) { return std::span(TheWorld().tokens).first(static_cast<size_t>(count)); }

// Runs what is not restored of the first `count` tokens.
void Prefill(Session& session, int64_t count, int64_t piece) {
  const Forward forward = session.forward();
  for (int64_t done = session.sequence().length(); done < count;) {
    const int64_t end = std::min(count, done + piece);
    OrExit(forward(Prompt(end).subspan(static_cast<size_t>(done)), count, {}));
    done = end;
  }
}

void BM_Prefill(benchmark::State& state) {
  const int64_t depth = state.range(0), count = 512;
  SessionOptions options = Options("dense", depth + count, false);
  options.store.clear();
  for (auto _ : state) {
    state.PauseTiming();
    auto session = OrExit(Session::Create(TheWorld().model, options));
    OrExit(session->Open(Prompt(depth + count)));
    Prefill(*session, depth, kPieceTokens);
    state.ResumeTiming();
    Prefill(*session, depth + count, kPieceTokens);
  }
  state.counters["tok/s"] = benchmark::Counter(static_cast<double>(state.iterations() * count), benchmark::Counter::kIsRate);
}

void BM_Decode(benchmark::State& state, const std::string& selector, int64_t depth, bool tiers) {
  constexpr int64_t kTokens = 64;
  auto session = OrExit(Session::Create(TheWorld().model, Options(selector, depth + kTokens + 8, tiers)));
  if (depth > 0) {
    OrExit(session->Open(Prompt(depth)));
    Prefill(*session, depth, kPieceTokens);
    OrExit(session->Flush());
  } else {
    OrExit(session->Open(Prompt(1)));
    Prefill(*session, 1, 1);
  }
  const Forward forward = session->forward();
  std::vector<float> logits(static_cast<size_t>(TheWorld().model->config.vocab));
  int64_t at = session->sequence().length();
  const int64_t end = at + kTokens;
  for (auto _ : state) {
    if (at == end) return state.SkipWithError("more iterations than tokens; run with the registered number");
    OrExit(forward(Prompt(at + 1).subspan(static_cast<size_t>(at)), 0, logits));
    ++at;
  }
  const SequenceReport& report = session->sequence().Report();
  const auto steps = static_cast<double>(report.decode_steps);
  const double ms = 1e3 / steps;
  state.counters["tok/s"] = benchmark::Counter(static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
  state.counters["ms_attention"] = ms * report.times.Total();
  state.counters["ms_gate"] = ms * report.times.gate;
  state.counters["ms_score"] = ms * report.times.score;
  state.counters["ms_choose"] = ms * report.times.choose;
  state.counters["ms_fetch"] = ms * (report.times.fetch + report.times.slow_clock);
  state.counters["ms_attend"] = ms * (report.times.attend + report.times.plan);
  state.counters["rho"] = report.rho();
  state.counters["attended"] = report.mean_attended();
  state.counters["KB_scored"] = static_cast<double>(report.bytes_scored()) / steps / 1024;
  state.counters["KB_attended"] = static_cast<double>(report.bytes_attended) / steps / 1024;
}

// The bytes of `path` past the page cache, in pieces of `block`, by all threads: the floor of a restore.
double RawReadSeconds(const std::string& path, int64_t blocks, size_t block) {
  const int file = open(path.c_str(), O_RDONLY | O_DIRECT);
  if (file < 0) OrExit(Status{StatusCode::kIoError, path + ": no direct I/O"});
  auto pool = OrExit(ThreadPool::Create({.loop_threads = TheWorld().threads}));
  const int64_t start = SteadyClock::Get().NowNanos();
  pool->ParallelFor(blocks, [&](int64_t i) {
    static thread_local void* buffer = aligned_alloc(4096, block);
    if (pread(file, buffer, block, static_cast<off_t>(i) * static_cast<off_t>(block)) != static_cast<ssize_t>(block)) std::exit(1);
  });
  const double seconds = SteadyClock::Get().SecondsSince(start);
  close(file);
  return seconds;
}

void BM_Restore(benchmark::State& state) {
  const int64_t count = state.range(0);
  const KvGeometry geometry = GeometryOf(TheWorld().model->config);
  const SessionOptions options = Options("tc", count + 8, false);
  {
    auto session = OrExit(Session::Create(TheWorld().model, options));
    OrExit(session->Open(Prompt(count)));
    Prefill(*session, count, kPieceTokens);
    OrExit(session->Flush());
  }
  const std::string raw = TheWorld().dir + "/raw";
  const int64_t blocks = (count - 1) / geometry.chunk_tokens * geometry.layers;
  {
    std::vector<uint64_t> block(geometry.block_bytes() / 8);
    uint64_t x = 88172645463325252ull;
    std::ofstream out(raw, std::ios::binary);
    for (int64_t i = 0; i < blocks; ++i) {
      for (uint64_t& word : block) word = (x ^= x << 13, x ^= x >> 7, x ^= x << 17);
      out.write(reinterpret_cast<const char*>(block.data()), static_cast<std::streamsize>(geometry.block_bytes()));
    }
  }
  sync();
  double restored = 0, raw_seconds = 0;
  for (auto _ : state) {
    state.PauseTiming();
    raw_seconds += RawReadSeconds(raw, blocks, geometry.block_bytes());
    auto session = OrExit(Session::Create(TheWorld().model, options));
    state.ResumeTiming();
    const int64_t start = SteadyClock::Get().NowNanos();
    OrExit(session->Open(Prompt(count)));
    restored += SteadyClock::Get().SecondsSince(start);
    state.PauseTiming();
    if (session->sequence().restored() != (count - 1) / 256 * 256) state.SkipWithError("the prefix was not restored");
    session.reset();
    state.ResumeTiming();
  }
  const double bytes = static_cast<double>(blocks) * static_cast<double>(geometry.block_bytes()) * static_cast<double>(state.iterations());
  state.counters["GB/s"] = bytes / restored * 1e-9;
  state.counters["raw_GB/s"] = bytes / raw_seconds * 1e-9;
  state.counters["%_of_raw"] = 100 * raw_seconds / restored;
  unlink(raw.c_str());
}

void Register() {
  for (const int64_t depth : {int64_t{0}, int64_t{4096}}) {
    benchmark::RegisterBenchmark("prefill_512", BM_Prefill)->Arg(depth)->Iterations(1)->UseRealTime()->Unit(benchmark::kMillisecond);
  }
  const auto decode = [](const std::string& selector, int64_t depth, bool tiers) {
    const std::string name = "decode/" + selector + (tiers ? "/tiers" : "") + "/depth:" + std::to_string(depth);
    benchmark::RegisterBenchmark(name.c_str(), [=](benchmark::State& state) { BM_Decode(state, selector, depth, tiers); })
        ->Iterations(48)
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  };
  for (const int64_t depth : {0, 4096, 7168, 8000}) decode("dense", depth, false);
  for (const int64_t depth : {4096, 7168, 8000}) decode("tc", depth, false);
  decode("tc", 7168, true);
  decode("cis,cis.tau=0.8", 8000, false);
  decode("cis,cis.tau=0.5", 8000, false);
  benchmark::RegisterBenchmark("restore", BM_Restore)->Arg(6000)->Iterations(5)->UseRealTime()->Unit(benchmark::kMillisecond);
}

// Takes --name=value out of the command line.
std::string Flag(int* argc, char** argv, const std::string& name, const std::string& otherwise) {
  std::string value = otherwise;
  int kept = 1;
  for (int i = 1; i < *argc; ++i) {
    const std::string argument = argv[i];
    if (argument.rfind("--" + name + "=", 0) == 0) {
      value = argument.substr(name.size() + 3);
    } else {
      argv[kept++] = argv[i];
    }
  }
  *argc = kept;
  return value;
}

int Main(int argc, char** argv) {
  World& world = TheWorld();
  const std::string model = Flag(&argc, argv, "model", "");
  const std::string document = Flag(&argc, argv, "document", "");
  world.dir = Flag(&argc, argv, "dir", "");
  world.threads = std::atoi(Flag(&argc, argv, "threads", "2").c_str());
  if (model.empty() || document.empty() || world.dir.empty()) {
    std::fprintf(stderr, "model_bench: give --model=FILE --document=FILE --dir=EMPTY_DIR\n");
    return 2;
  }
  world.model = OrExit(reference::LoadModel({.path = model}));
  std::ifstream in(document, std::ios::binary);
  std::string text(200000, ' ');
  in.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(in.gcount()));
  const auto tokenizer = OrExit(reference::Tokenizer::Create(world.model->tokenizer));
  world.tokens = OrExit(tokenizer->Encode(text));
  Register();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace prehoc::cli

int main(int argc, char** argv) { return prehoc::cli::Main(argc, argv); }
