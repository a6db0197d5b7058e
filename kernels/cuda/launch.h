// What the host side of every device kernel shares: checks that name field and value, and launches. Internal to kernels/cuda.
#pragma once
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <string>
#include <type_traits>
#include <utility>

#include "base/cuda/error.h"
#include "base/result.h"
#include "kernels/cuda/device_kernels.h"

namespace prehoc::cuda {

struct DeviceLimits {
  int multiprocessors = 0;
  int block_shared_bytes = 0;
  int l2_bytes = 0;
  int major = 0;  // compute capability of the device
  int code = 0;   // major one that its kernels were compiled for: less, where the driver compiled PTX of an older one
  // What both the device and the code of its kernels have: clusters, and launches while the kernel before ends.
  bool clusters() const { return major >= 9 && code >= 9; }
};
// Of the current device; asked once per device.
Result<DeviceLimits> CurrentLimits();
Result<int> CodeOfKernels();  // DeviceLimits::code

// The first thing that is wrong with a call.
class Check {
 public:
  explicit Check(const char* kernel) : kernel_(kernel) {}
  Check& That(bool holds, const char* field, int64_t value, const char* wanted, StatusCode code = StatusCode::kInvalid) {
    if (!holds && status_.ok()) {
      status_ = Status(code, std::string(kernel_) + ": " + field + "=" + std::to_string(value) + "; " + wanted);
    }
    return *this;
  }
  Check& Given(const void* pointer, const char* field) {
    if (pointer == nullptr && status_.ok()) status_ = Status(StatusCode::kInvalid, std::string(kernel_) + ": " + field + " is null");
    return *this;
  }
  Check& Count(int32_t tasks) { return That(tasks >= 0 && tasks <= 65535, "num_tasks", tasks, "use 0 to 65535"); }
  Check& Tasks(const void* tasks, int32_t count) {
    Count(count);
    return count > 0 ? Given(tasks, "tasks") : *this;
  }
  Check& HeadDim(int32_t d) {
    return That(d == 64 || d == 96 || d == 128 || d == 256, "head_dim", d, "use 64, 96, 128 or 256", StatusCode::kUnsupported);
  }
  Check& Group(int32_t group) {
    return That(group >= 1 && group <= 256, "group", group, "use 1 to 256 query heads per KV head", StatusCode::kUnsupported);
  }
  Check& Rows(const char* field, RowFormat format) {
    return That(IsRowFormat(format), field, static_cast<int64_t>(format), "use 1 (f16), 2 (int8) or 3 (e4m3)");
  }
  // Rows of 8 bits stand for fp16 rows, and no others.
  Check& RowsOfType(const char* field, RowFormat format, RowType type) {
    return Rows(field, format).That(format == RowFormat::kF16 || type == RowType::kF16, "type", static_cast<int64_t>(type),
                                    "use kF16 beside rows of int8 or e4m3", StatusCode::kUnsupported);
  }
  Check& Type(RowType type) {
    return That(type <= RowType::kBF16, "type", static_cast<int64_t>(type), "use kF16 or kBF16", StatusCode::kUnsupported);
  }
  Status Take() { return std::move(status_); }

 private:
  const char* kernel_;
  Status status_;
};

// fn(std::integral_constant<int, v>) for the one of Vs that is `value`. Requires that there is one.
template <int... Vs, class Fn>
Status Dispatch(int value, Fn&& fn) {
  Status result{StatusCode::kUnsupported, "value " + std::to_string(value) + " has no kernel"};
  const auto try_one = [&](auto v) {
    if (value == v()) result = fn(v);
    return value == v();
  };
  static_cast<void>((try_one(std::integral_constant<int, Vs>{}) || ...));
  return result;
}
template <class Fn>
Status DispatchHeadDim(int head_dim, Fn&& fn) {
  return Dispatch<64, 96, 128, 256>(head_dim, std::forward<Fn>(fn));
}

struct Shape {
  dim3 grid;
  int threads = 0;
  size_t shared_bytes = 0;
  size_t most_shared_bytes = 0;  // of any launch of this kernel, where they differ: other threads may launch it, too
  int cluster = 1;           // neighbours in x that run at once
  bool cooperative = false;  // all blocks run at once
  bool keeps_l1 = false;     // reads again what the first-level cache holds: shared memory takes no more of it than blocks need.
                             // Of a kernel, not of a launch: the first one's numbers count
  size_t usual_shared_bytes = 0;  // with keeps_l1: of the launches that this is for, where some take more; 0: the most of any
};
// How many clusters of `shape` the current device runs at once; 0 if none. Asks the driver each time.
int MostClusters(const void* kernel, const Shape& shape);

// How many blocks of a kernel run at once in clusters of 2^log; asked once per device. For one kernel and shape, or those alike.
class ClusterPlaces {
 public:
  static constexpr int kMostLog = 4;  // 16 blocks
  int Of(const void* kernel, Shape shape, int log);

 private:
  static constexpr int kDevices = 64;
  std::array<std::array<std::atomic<int>, kMostLog + 1>, kDevices> known_{};  // + 1
};

// A kernel that calls WaitForEarlierWork() first. On sm_90 it is launched while the kernel before it ends.
Status LaunchAny(const void* kernel, const char* name, void** args, const Shape& shape, cudaStream_t stream);
template <class Args>
Status LaunchKernel(void (*kernel)(Args), const char* name, const Args& args, const Shape& shape, cudaStream_t stream) {
  void* pointers[] = {const_cast<Args*>(&args)};
  return LaunchAny(reinterpret_cast<const void*>(kernel), name, pointers, shape, stream);
}

}  // namespace prehoc::cuda
