// What the GPU benchmarks share: arrays on the device, pinned memory, timing of graphs, and result files.
#pragma once
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "base/cuda/buffer.h"
#include "base/cuda/device.h"
#include "base/cuda/error.h"
#include "base/cuda/stream.h"
#include "base/precision.h"
#include "bench/or_exit.h"

namespace prehoc {

using Json = nlohmann::ordered_json;

inline void Cuda(cudaError_t error, const char* what) { OrExit(CudaStatus(error, what)); }
inline double Seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Device memory that the driver has given out, to whom it may be.
inline size_t DriverBytes() {
  size_t free = 0, all = 0;
  Cuda(cudaMemGetInfo(&free, &all), "cudaMemGetInfo");
  return all - free;
}

// Device memory, zeroed: a kernel that forgets to write is seen by the checks.
template <class T>
class Array {
 public:
  explicit Array(size_t size) : bytes_(OrExit(CudaBytes::Create(CudaPlace::kDevice, std::max<size_t>(size, 1) * sizeof(T)))), size_(size) {
    Cuda(cudaMemset(bytes_.data(), 0, bytes_.size()), "memset");
    Cuda(cudaDeviceSynchronize(), "memset");  // other streams do not wait for it
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) { Write(values); }
  void Write(const std::vector<T>& values) {
    Cuda(cudaMemcpy(bytes_.data(), values.data(), values.size() * sizeof(T), cudaMemcpyDefault), "copy");
    Cuda(cudaDeviceSynchronize(), "copy");  // it may return before the last bytes are there, and other streams do not wait for it
  }
  std::vector<T> Read() const { return Read(0, size_); }
  std::vector<T> Read(size_t from, size_t count) const {
    std::vector<T> values(count);
    Cuda(cudaMemcpy(values.data(), data() + from, count * sizeof(T), cudaMemcpyDefault), "read");
    return values;
  }
  T* data() const { return reinterpret_cast<T*>(bytes_.data()); }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }

 private:
  CudaBytes bytes_;
  size_t size_;
};

// Pinned host memory in huge pages: mapped, touched by all CPUs, registered piece by piece. Says how fast.
class PinnedPool {
 public:
  explicit PinnedPool(size_t size);
  ~PinnedPool();
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  // A copy may not cross from one registration into the next (kernels may).
  void CopyHere(std::byte* to, const std::byte* from, size_t size, cudaStream_t stream) const;
  // Random halves everywhere, through the device.
  void Fill(cudaStream_t stream) const;
  Json Report() const;

 private:
  static constexpr size_t kPiece = size_t{256} << 20;
  size_t size_, mapped_;
  void* map_ = nullptr;
  std::byte* data_ = nullptr;
  double seconds_ = 0, touch_seconds_ = 0, first_piece_seconds_ = 0;
};

// Median, least and most of repeated measurements.
struct Spread {
  double median = 0, least = 0, most = 0;
};
Spread SpreadOf(std::vector<double> values);

// Microseconds between events around what `run` enqueues, `repeats` times after `warm` others.
Spread MeasureStream(cudaStream_t stream, const std::function<void()>& run, int repeats, int warm);

// What `enqueue` enqueues, as one graph.
class Graph {
 public:
  Graph(cudaStream_t stream, const std::function<void()>& enqueue);
  Graph(Graph&& other) noexcept : run_(std::exchange(other.run_, nullptr)), nodes_(other.nodes_) {}
  ~Graph();
  void Launch(cudaStream_t stream) const { Cuda(cudaGraphLaunch(run_, stream), "launch"); }
  int nodes() const { return nodes_; }
  Spread Measure(cudaStream_t stream, int repeats, int warm = 3) const {
    return MeasureStream(stream, [&] { Launch(stream); }, repeats, warm);
  }

 private:
  cudaGraphExec_t run_ = nullptr;
  int nodes_ = 0;
};

// Flags --name=value. Where a program lies and writes is nobody's business: `line` leaves out --out and --commit.
class Flags {
 public:
  Flags(const char* program, int argc, char** argv);
  std::string Text(const std::string& name, const std::string& otherwise);
  int Int(const std::string& name, int otherwise) { return std::stoi(Text(name, std::to_string(otherwise))); }
  double Number(const std::string& name, double otherwise) { return std::stod(Text(name, std::to_string(otherwise))); }
  // Fails on a flag that nobody has asked for.
  void Finish() const;
  const std::string& line() const { return line_; }

 private:
  std::string line_;
  std::vector<std::pair<std::string, std::string>> given_;
  std::vector<std::string> asked_;
};

std::vector<std::string> Split(const std::string& text, char at);
// --precision=fp32 (default) or half.
PromptPrecision PrecisionOf(Flags& flags);

// "command", "device", "driver", "commit" and what else makes a result one of its own.
Json Header(const std::string& bench, const Flags& flags, const std::string& commit);
// A line for each member, and for each element of an array of objects. Does nothing without a path.
void WriteJson(const Json& json, const std::string& path);

}  // namespace prehoc
