// How fast do chunks leave the device and come back, and which way is best for pieces of which size?
//
//   transfer_bench --out=FILE.json [--commit=ID] [--only=pinning,chunks,gather] [--pool-gib=32] [--arena-gib=8] [--repeats=7]
//
// chunks: batches of 1 MiB and 4 MiB pieces through CudaTransferEngine, each way and both ways at once (two engines), beside one large
// cudaMemcpyAsync each way: the copy engine's rate. Wall time from Post() to Wait(), so that the CPU's calls count.
// gather: pieces of 256 B to 64 KiB from all over a pinned pool, in random and in rising order: by a kernel of 16 blocks (time of a graph), and
// by CudaTransferEngine (wall time, its choice of kernel or copy engine and its lists included).
// pinning: a HostArena as the host tier has it, pinned extent by extent in the background while blocks are taken as fast as they come; beside
// it the pool of this program, touched by all CPUs first and registered after that. "fresh" memory is given to the machine with its first
// touch, "again" is a second arena after the first has gone.
// Bytes are random; after every measurement some pieces are compared with their source.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "base/cuda/host_registrar.h"
#include "base/executor.h"
#include "base/rng.h"
#include "base/units.h"
#include "bench/gpu/support.h"
#include "bench/gpu/synthetic.h"
#include "kernels/cuda/device_kernels.h"
#include "transfer/cuda_transfer_engine.h"
#include "transfer/host_arena.h"

namespace prehoc {
namespace {

// `count` pieces of `bytes` from `src` to `dst`, one after the other.
std::vector<TransferPiece> Pieces(const std::byte* src, std::byte* dst, size_t bytes, size_t count) {
  std::vector<TransferPiece> pieces;
  for (size_t i = 0; i < count; ++i) pieces.push_back({src + i * bytes, dst + i * bytes, bytes});
  return pieces;
}

Json Pinning(uint64_t bytes, uint64_t extent, bool fresh) {
  const auto executor = OrExit(ThreadPool::Create({}));
  CudaHostRegistrar registrar;
  const double start = Seconds();
  const auto arena = OrExit(HostArena::Create({.block_bytes = 4 * kMiB, .budget = bytes, .extent_bytes = extent, .registrar = &registrar}, executor.get()));
  double first = 0;
  for (int64_t i = 0; i < arena->capacity_blocks(); ++i) {
    const BlockId block = OrExit(arena->Allocate());
    if (i > 0) continue;
    first = Seconds() - start;
    cudaPointerAttributes attributes{};
    Cuda(cudaPointerGetAttributes(&attributes, arena->block(block).data()), "attributes");
    if (attributes.type != cudaMemoryTypeHost) Fail({StatusCode::kCorrupt, "arena: a block is not pinned"});
  }
  const double all = Seconds() - start;
  std::printf("arena of %.0f GiB, extents of %.0f MiB, %s: first block after %.1f ms, all at %.2f GB/s\n", double(bytes) / double(kGiB), double(extent) / double(kMiB),
              fresh ? "fresh" : "again", first * 1e3, double(bytes) / all / 1e9);
  executor->Drain();
  return {{"name", "arena pinned"}, {"bytes", bytes}, {"extent", extent}, {"memory", fresh ? "fresh" : "again"}, {"first_block_ms", first * 1e3}, {"seconds", all},
          {"gb_per_s", double(bytes) / all / 1e9}};
}

class TransferBench {
 public:
  TransferBench(size_t pool_bytes, int repeats)
      : repeats_(repeats), pool_(pool_bytes), a_(kChunkBytes), b_(kChunkBytes), in_(OrExit(CudaStream::Create())), out_(OrExit(CudaStream::Create())),
        engine_in_(OrExit(CudaTransferEngine::Create())), engine_out_(OrExit(CudaTransferEngine::Create())) {
    pool_.Fill(in_.get());
    OrExit(FillNormal(reinterpret_cast<uint16_t*>(a_.data()), int64_t(kChunkBytes / 2), 1, 3, in_.get()));
    OrExit(FillNormal(reinterpret_cast<uint16_t*>(b_.data()), int64_t(kChunkBytes / 2), 1, 4, in_.get()));
    OrExit(in_.Synchronize());
  }
  Json pool() const { return pool_.Report(); }
  const Json& rows() const { return rows_; }

  void Chunks() {
    std::byte* const down = pool_.data();              // from a_ on the device
    std::byte* const up = pool_.data() + kChunkBytes;  // to b_
    // The copy engine itself, with copies as large as a registration allows.
    constexpr size_t kLarge = size_t{256} << 20;
    const auto large = [&](bool to_host, bool to_device) {
      Wall([&] {
        for (size_t at = 0; at < kChunkBytes; at += kLarge) {
          if (to_host) Cuda(cudaMemcpyAsync(down + at, a_.data() + at, kLarge, cudaMemcpyDefault, out_.get()), "copy");
          if (to_device) Cuda(cudaMemcpyAsync(b_.data() + at, up + at, kLarge, cudaMemcpyDefault, in_.get()), "copy");
        }
        OrExit(out_.Synchronize());
        OrExit(in_.Synchronize());
      }, "copies of 256 MiB", to_host, to_device, kLarge, 0);
    };
    large(true, false), large(false, true), large(true, true);
    for (const size_t bytes : {kMiB, 4 * kMiB}) {
      // Requests of 128 MiB, both ways in turns: the driver takes about a thousand calls before it makes a caller wait.
      const size_t part = size_t{128} << 20;
      std::vector<TransferRequest> to_host, to_device;
      for (size_t at = 0; at < kChunkBytes; at += part) {
        to_host.push_back(OrExit(engine_out_->Prepare(Pieces(a_.data() + at, down + at, bytes, part / bytes))));
        to_device.push_back(OrExit(engine_in_->Prepare(Pieces(up + at, b_.data() + at, bytes, part / bytes))));
      }
      for (const int ways : {1, 2, 3}) {
        const bool out = (ways & 1) != 0, in = (ways & 2) != 0;
        Cuda(cudaMemset(b_.data(), 0x5a, in ? kChunkBytes : 0), "poison");
        if (out) std::memset(down, 0x5a, kChunkBytes);
        Cuda(cudaDeviceSynchronize(), "poison");
        Wall([&] {
          for (size_t i = 0; i < to_host.size(); ++i) {
            if (out) OrExit(to_host[i].Post());
            if (in) OrExit(to_device[i].Post());
          }
          for (size_t i = 0; i < to_host.size(); ++i) {
            if (out) OrExit(to_host[i].Wait());
            if (in) OrExit(to_device[i].Wait());
          }
        }, "chunks", out, in, bytes, best_[ways - 1]);
        if (out) Same(a_.data(), down, kChunkBytes);
        if (in) Same(up, b_.data(), kChunkBytes);
      }
    }
  }

  void Gather(size_t piece, bool sorted, bool by_engine) {
    // Enough to measure, not more than the slots hold or a slow way takes a second for.
    const size_t limit = pool_.size() / piece, most = by_engine && piece > kKiB ? 16384 : 262144, count = std::min(most, std::min(kChunkBytes / 2, limit * piece) / piece);
    Rng rng(piece + (sorted ? 1 : 0));
    std::vector<int32_t> from(count), to(count);
    for (size_t i = 0; i < count; ++i) from[i] = int32_t(rng.Int(0, int64_t(limit) - 1)), to[i] = int32_t(i);
    if (sorted) std::sort(from.begin(), from.end());
    Cuda(cudaMemset(b_.data(), 0x5a, count * piece), "poison");
    Cuda(cudaDeviceSynchronize(), "poison");
    Json row{{"name", by_engine ? "pieces by the transfer engine" : "pieces by the gather kernel"}, {"piece", piece}, {"count", count}, {"order", sorted ? "rising" : "random"}};
    Spread us;
    if (by_engine) {
      std::vector<TransferPiece> pieces;
      for (size_t i = 0; i < count; ++i) pieces.push_back({pool_.data() + size_t(from[i]) * piece, b_.data() + i * piece, piece});
      auto request = OrExit(engine_in_->Prepare(std::move(pieces)));
      us = WallSpread([&] {
        OrExit(request.Post());
        OrExit(request.Wait());
      });
    } else {
      const Array<int32_t> device_from(from), device_to(to), device_count(std::vector<int32_t>{int32_t(count)});
      const Array<cuda::GatherTask> task(std::vector<cuda::GatherTask>{{.from = pool_.data(), .to = b_.data(), .from_piece = device_from.data(), .to_piece = device_to.data(),
                                                                        .count = device_count.data(), .from_limit = int64_t(limit), .to_limit = int64_t(count)}});
      const Graph graph(in_.get(), [&] {
        OrExit(cuda::Gather({.tasks = task.data(), .num_tasks = 1, .piece_bytes = int32_t(piece), .max_blocks = kBlocks}, in_.get()));
      });
      us = graph.Measure(in_.get(), repeats_, 1);
      row["blocks"] = kBlocks;
    }
    const auto got = b_.Read(0, count * piece);
    for (size_t i = 0; i < count; ++i) {
      if (std::memcmp(got.data() + i * piece, pool_.data() + size_t(from[i]) * piece, piece) != 0) {
        Fail({StatusCode::kCorrupt, "gather: piece " + std::to_string(i) + " of " + std::to_string(piece) + " bytes is wrong"});
      }
    }
    const double bytes = double(count * piece);
    row["us"] = us.median, row["us_least"] = us.least, row["us_most"] = us.most, row["gb_per_s"] = bytes / us.median / 1e3;
    row["million_pieces_per_s"] = double(count) / us.median;
    rows_.push_back(row);
    std::printf("%-30s %6zu B %-7s %8zu pieces  %9.1f us  %6.2f GB/s  %7.2f M/s\n", std::string(row["name"]).c_str(), piece, sorted ? "rising" : "random", count, us.median,
                bytes / us.median / 1e3, double(count) / us.median);
    std::fflush(stdout);
  }

 private:
  static constexpr size_t kChunkBytes = size_t{2} << 30;  // one way
  static constexpr int kBlocks = 16;

  template <class Fn>
  Spread WallSpread(const Fn& run) {
    std::vector<double> us;
    for (int i = -1; i < repeats_; ++i) {
      const double start = Seconds();
      run();
      if (i >= 0) us.push_back((Seconds() - start) * 1e6);
    }
    return SpreadOf(us);
  }
  // `of`: the copy engine's rate, or 0 if this is it.
  template <class Fn>
  void Wall(const Fn& run, const char* name, bool out, bool in, size_t piece, double of) {
    const Spread us = WallSpread(run);
    const double rate = double(kChunkBytes) * ((out ? 1 : 0) + (in ? 1 : 0)) / us.median / 1e3;
    const char* const way = out && in ? "both" : out ? "to host" : "to device";
    Json row{{"name", name}, {"way", way}, {"piece", piece}, {"bytes_each_way", kChunkBytes}, {"us", us.median}, {"us_least", us.least}, {"us_most", us.most}, {"gb_per_s", rate}};
    if (of > 0) row["of_copy_engine"] = rate / of;
    else best_[(out ? 1 : 0) + (in ? 2 : 0) - 1] = rate;
    rows_.push_back(row);
    std::printf("%-20s %-10s %5.1f MiB  %6.2f GB/s  %.3f of the copy engine\n", name, way, double(piece) / double(kMiB), rate, of > 0 ? rate / of : 1.0);
    std::fflush(stdout);
  }
  // One side is on the device.
  void Same(const std::byte* x, const std::byte* y, size_t bytes) {
    constexpr size_t kPart = size_t{64} << 20;
    std::vector<std::byte> a(kPart), b(kPart);
    for (size_t at = 0; at < bytes; at += 5 * kPart) {
      Cuda(cudaMemcpy(a.data(), x + at, kPart, cudaMemcpyDefault), "read");
      Cuda(cudaMemcpy(b.data(), y + at, kPart, cudaMemcpyDefault), "read");
      if (std::memcmp(a.data(), b.data(), kPart) != 0) Fail({StatusCode::kCorrupt, "chunks: bytes differ from their source"});
    }
  }

  const int repeats_;
  const PinnedPool pool_;
  const Array<std::byte> a_, b_;
  const CudaStream in_, out_;
  const std::unique_ptr<CudaTransferEngine> engine_in_, engine_out_;
  double best_[3] = {};  // of the copy engine: to host, to device, both
  Json rows_ = Json::array();
};

int Main(int argc, char** argv) {
  Flags flags("transfer_bench", argc, argv);
  const std::string out = flags.Text("out", ""), commit = flags.Text("commit", "unknown"), only = "," + flags.Text("only", "pinning,chunks,gather") + ",";
  const int pool_gib = flags.Int("pool-gib", 32), arena_gib = flags.Int("arena-gib", 8), repeats = flags.Int("repeats", 7);
  flags.Finish();
  if (pool_gib < 4) Fail({StatusCode::kInvalid, "--pool-gib=" + std::to_string(pool_gib) + "; use 4 or more"});
  Json file = Header("transfers", flags, commit);
  Json pinned = Json::array();
  if (only.find(",pinning,") != std::string::npos) {
    const uint64_t bytes = uint64_t(arena_gib) << 30;
    Cuda(cudaFree(nullptr), "context");  // not what is measured
    for (const uint64_t extent : {64 * kMiB, 512 * kMiB}) {
      pinned.push_back(Pinning(bytes, extent, extent == 64 * kMiB));
      pinned.push_back(Pinning(bytes, extent, false));
    }
    file["pinning"] = pinned;
    WriteJson(file, out);
  }
  TransferBench bench(size_t(pool_gib) << 30, repeats);
  file["pool"] = bench.pool();
  if (only.find(",chunks,") != std::string::npos) bench.Chunks();
  if (only.find(",gather,") != std::string::npos) {
    for (const bool by_engine : {false, true}) {
      for (const bool sorted : {false, true}) {
        for (size_t piece = 256; piece <= 64 * kKiB; piece *= 2) bench.Gather(piece, sorted, by_engine);
      }
    }
  }
  file["results"] = bench.rows();
  WriteJson(file, out);
  return 0;
}
}  // namespace
}  // namespace prehoc

int main(int argc, char** argv) { return prehoc::Main(argc, argv); }
