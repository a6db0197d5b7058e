#include <algorithm>
#include <array>
#include <atomic>
#include <set>
#include <utility>

#include "base/mutex.h"
#include "kernels/cuda/launch.h"

namespace prehoc::cuda {

Result<DeviceLimits> CurrentLimits() {
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> l2{}, code{};  // written first
  static std::array<std::atomic<int64_t>, kDevices> known{};  // major << 48 | multiprocessors << 32 | shared bytes
  int device = 0;
  PREHOC_CUDA_TRY(cudaGetDevice(&device));
  std::atomic<int64_t>* const slot = device < kDevices ? &known[static_cast<size_t>(device)] : nullptr;
  const int64_t packed = slot != nullptr ? slot->load(std::memory_order_acquire) : 0;
  if (packed != 0) {
    const auto at = static_cast<size_t>(device);
    return DeviceLimits{.multiprocessors = static_cast<int>((packed >> 32) & 0xffff), .block_shared_bytes = static_cast<int>(packed & 0xffffffff),
                        .l2_bytes = l2[at].load(std::memory_order_relaxed), .major = static_cast<int>(packed >> 48),
                        .code = code[at].load(std::memory_order_relaxed)};
  }
  DeviceLimits limits;
  PREHOC_CUDA_TRY(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  PREHOC_CUDA_TRY(cudaDeviceGetAttribute(&limits.block_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  PREHOC_CUDA_TRY(cudaDeviceGetAttribute(&limits.major, cudaDevAttrComputeCapabilityMajor, device));
  PREHOC_CUDA_TRY(cudaDeviceGetAttribute(&limits.l2_bytes, cudaDevAttrL2CacheSize, device));
  PREHOC_ASSIGN_OR_RETURN(limits.code, CodeOfKernels());
  if (slot != nullptr) {
    l2[static_cast<size_t>(device)].store(limits.l2_bytes, std::memory_order_relaxed);
    code[static_cast<size_t>(device)].store(limits.code, std::memory_order_relaxed);
    slot->store(int64_t{limits.major} << 48 | int64_t{limits.multiprocessors} << 32 | limits.block_shared_bytes, std::memory_order_release);
  }
  return limits;
}

namespace {
// The attributes of a launch, and the kernel's own that it needs.
struct Configuration {
  cudaLaunchConfig_t config{};
  std::array<cudaLaunchAttribute, 3> attributes{};
};
Status Configure(const void* kernel, const char* name, const Shape& shape, bool overlaps, Configuration* to) {
  // Without asking, a block gets 48 KiB, of which what a kernel declares itself is taken too: some KiB at most.
  const size_t most = std::max(shape.shared_bytes, shape.most_shared_bytes);
  if (most > 40 * 1024) {
    PREHOC_RETURN_IF_ERROR(CudaStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)), name));
  }
  if (shape.cluster > 8) {
    PREHOC_RETURN_IF_ERROR(CudaStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name));
  }
  unsigned count = 0;
  if (shape.cluster > 1) {
    to->attributes[count].id = cudaLaunchAttributeClusterDimension;
    to->attributes[count].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    ++count;
  }
  if (shape.cooperative) {
    to->attributes[count].id = cudaLaunchAttributeCooperative;
    to->attributes[count].val.cooperative = 1;
    ++count;
  }
  if (overlaps) {
    to->attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    to->attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  to->config.gridDim = shape.grid;
  to->config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  to->config.dynamicSmemBytes = shape.shared_bytes;
  to->config.attrs = to->attributes.data();
  to->config.numAttrs = count;
  return {};
}

// A multiprocessor that a kernel with much shared memory leaves keeps so much of it set aside, while it suffices for the next kernel. One that
// needs the first-level cache says so, once: what the blocks use that run at once, in percent.
Status KeepL1(const void* kernel, const char* name, const Shape& shape) {
  static Mutex mutex;
  static auto* const told = new std::set<std::pair<int, const void*>>;
  int device = 0;
  PREHOC_CUDA_TRY(cudaGetDevice(&device));
  const MutexLock lock(mutex);
  if (told->contains({device, kernel})) return {};
  constexpr size_t kOfEachBlock = 1024;
  int room = 0, blocks = 0;
  cudaFuncAttributes attributes{};
  PREHOC_CUDA_TRY(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  PREHOC_RETURN_IF_ERROR(CudaStatus(cudaFuncGetAttributes(&attributes, kernel), name));
  const size_t bytes = shape.usual_shared_bytes > 0 ? shape.usual_shared_bytes : std::max(shape.shared_bytes, shape.most_shared_bytes);
  PREHOC_RETURN_IF_ERROR(CudaStatus(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, shape.threads, bytes), name));
  const size_t used = static_cast<size_t>(blocks) * (attributes.sharedSizeBytes + bytes + kOfEachBlock);
  const size_t percent = std::min<size_t>(100, (100 * used + static_cast<size_t>(room) - 1) / static_cast<size_t>(std::max(room, 1)));
  PREHOC_RETURN_IF_ERROR(CudaStatus(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, static_cast<int>(percent)), name));
  told->emplace(device, kernel);
  return {};
}
}  // namespace

int MostClusters(const void* kernel, const Shape& shape) {
  Configuration to;
  if (!Configure(kernel, "clusters", shape, false, &to).ok()) return 0;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &to.config) == cudaSuccess) return clusters;
  static_cast<void>(cudaGetLastError());
  return 0;
}

int ClusterPlaces::Of(const void* kernel, Shape shape, int log) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  std::atomic<int>& known = known_[static_cast<size_t>(device)][static_cast<size_t>(log)];
  if (known.load(std::memory_order_relaxed) == 0) {
    shape.cluster = 1 << log;
    shape.grid = dim3(1u << log);
    known.store((MostClusters(kernel, shape) << log) + 1, std::memory_order_relaxed);
  }
  return known.load(std::memory_order_relaxed) - 1;
}

Status LaunchAny(const void* kernel, const char* name, void** args, const Shape& shape, cudaStream_t stream) {
  PREHOC_ASSIGN_OR_RETURN(const DeviceLimits limits, CurrentLimits());
  Configuration to;
  PREHOC_RETURN_IF_ERROR(Configure(kernel, name, shape, limits.clusters(), &to));
  if (shape.keeps_l1) PREHOC_RETURN_IF_ERROR(KeepL1(kernel, name, shape));  // counts blocks, which must be allowed their shared memory by then
  to.config.stream = stream;
  return CudaStatus(cudaLaunchKernelExC(&to.config, kernel, args), name);
}

}  // namespace prehoc::cuda
