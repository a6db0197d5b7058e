#include "bench/gpu/support.h"

#include <sys/mman.h>

#include <thread>

#include "base/units.h"
#include "bench/gpu/synthetic.h"

namespace prehoc {

PinnedPool::PinnedPool(size_t size) : size_(RoundUp(size, size_t{2} << 20)), mapped_(size_ + (size_t{2} << 20)) {
  const double start = Seconds();
  map_ = ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map_ == MAP_FAILED) Fail({StatusCode::kOutOfSpace, "mmap of the host pool"});
  data_ = reinterpret_cast<std::byte*>(RoundUp(reinterpret_cast<uintptr_t>(map_), uintptr_t{2} << 20));
  ::madvise(data_, size_, MADV_HUGEPAGE);
  const unsigned num = std::max(1u, std::thread::hardware_concurrency());
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < num; ++i) {
    threads.emplace_back([&, i] {
      for (size_t page = i; page < size_ >> 21; page += num) {
        for (size_t small = 0; small < size_t{2} << 20; small += 4096) data_[(page << 21) + small] = std::byte{1};
      }
    });
  }
  for (auto& thread : threads) thread.join();
  touch_seconds_ = Seconds() - start;
  for (size_t from = 0; from < size_; from += kPiece) {
    Cuda(cudaHostRegister(data_ + from, std::min(kPiece, size_ - from), cudaHostRegisterPortable | cudaHostRegisterMapped), "cudaHostRegister");
    if (from == 0) first_piece_seconds_ = Seconds() - start;
  }
  seconds_ = Seconds() - start;
}
PinnedPool::~PinnedPool() {
  for (size_t from = 0; from < size_; from += kPiece) CountCudaError(cudaHostUnregister(data_ + from));
  ::munmap(map_, mapped_);
}
void PinnedPool::CopyHere(std::byte* to, const std::byte* from, size_t size, cudaStream_t stream) const {
  while (size > 0) {
    const auto at = static_cast<size_t>(to - data_), part = std::min(size, (at / kPiece + 1) * kPiece - at);
    Cuda(cudaMemcpyAsync(to, from, part, cudaMemcpyDeviceToHost, stream), "to host");
    to += part, from += part, size -= part;
  }
}
void PinnedPool::Fill(cudaStream_t stream) const {
  const Array<uint16_t> part(size_t{512} << 20);
  for (size_t from = 0; from < size_; from += part.bytes()) {
    const size_t size = std::min(part.bytes(), size_ - from);
    OrExit(FillNormal(part.data(), static_cast<int64_t>(size / 2), 1, from + 1, stream));
    CopyHere(data_ + from, reinterpret_cast<const std::byte*>(part.data()), size, stream);
  }
  Cuda(cudaStreamSynchronize(stream), "fill");
}
Json PinnedPool::Report() const {
  return {{"bytes", size_}, {"seconds", seconds_}, {"touch_seconds", touch_seconds_}, {"first_256_mib_usable_after_s", first_piece_seconds_},
          {"gb_per_s", static_cast<double>(size_) / seconds_ / 1e9}};
}

Spread SpreadOf(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  return {values[values.size() / 2], values.front(), values.back()};
}

Graph::Graph(cudaStream_t stream, const std::function<void()>& enqueue) {
  cudaGraph_t graph = nullptr;
  Cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin capture");
  enqueue();
  Cuda(cudaStreamEndCapture(stream, &graph), "end capture");
  size_t nodes = 0;
  Cuda(cudaGraphGetNodes(graph, nullptr, &nodes), "nodes");
  nodes_ = static_cast<int>(nodes);
  Cuda(cudaGraphInstantiate(&run_, graph, 0), "instantiate");
  Cuda(cudaGraphDestroy(graph), "destroy");
}
Graph::~Graph() {
  if (run_ != nullptr) CountCudaError(cudaGraphExecDestroy(run_));
}
Spread MeasureStream(cudaStream_t stream, const std::function<void()>& run, int repeats, int warm) {
  const CudaEvent start = OrExit(CudaEvent::Create(CudaEvent::Timing::kOn)), end = OrExit(CudaEvent::Create(CudaEvent::Timing::kOn));
  std::vector<double> times;
  for (int i = -warm; i < repeats; ++i) {
    OrExit(start.Record(stream));
    run();
    OrExit(end.Record(stream));
    OrExit(end.Synchronize());
    if (i >= 0) times.push_back(1000.0 * static_cast<double>(OrExit(end.MillisecondsSince(start))));
  }
  return SpreadOf(times);
}

Flags::Flags(const char* program, int argc, char** argv) : line_(program) {
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const size_t equals = arg.find('=');
    if (arg.rfind("--", 0) != 0 || equals == std::string::npos) Fail({StatusCode::kInvalid, arg + ": use --name=value"});
    const std::string name = arg.substr(2, equals - 2);
    given_.emplace_back(name, arg.substr(equals + 1));
    if (name != "out" && name != "commit") line_ += " " + arg;
  }
}
std::string Flags::Text(const std::string& name, const std::string& otherwise) {
  asked_.push_back(name);
  for (const auto& [key, value] : given_) {
    if (key == name) return value;
  }
  return otherwise;
}
void Flags::Finish() const {
  for (const auto& [key, value] : given_) {
    if (std::find(asked_.begin(), asked_.end(), key) == asked_.end()) Fail({StatusCode::kInvalid, "--" + key + " is no flag; see the top of the source"});
  }
}

PromptPrecision PrecisionOf(Flags& flags) {
  const std::string name = flags.Text("precision", "fp32");
  const std::optional<PromptPrecision> found = FindPromptPrecision(name);
  if (!found) Fail({StatusCode::kInvalid, "--precision=" + name + ": use fp32 or half"});
  return *found;
}

std::vector<std::string> Split(const std::string& text, char at) {
  std::vector<std::string> parts;
  for (size_t from = 0; from <= text.size();) {
    const size_t end = std::min(text.find(at, from), text.size());
    if (end > from) parts.push_back(text.substr(from, end - from));
    from = end + 1;
  }
  return parts;
}

Json Header(const std::string& bench, const Flags& flags, const std::string& commit) {
  const CudaDevice gpu = OrExit(CurrentCudaDevice());
  return {{"bench", bench}, {"command", flags.line()}, {"device", gpu.name}, {"multiprocessors", gpu.multiprocessors},
          {"driver", gpu.driver_version}, {"runtime", gpu.runtime_version}, {"commit", commit}};
}
void WriteJson(const Json& json, const std::string& path) {
  if (path.empty()) return;
  std::string text = "{\n";
  for (auto item = json.begin(); item != json.end(); ++item) {
    if (item != json.begin()) text += ",\n";
    text += Json(item.key()).dump() + ": ";
    if (item->is_array() && !item->empty() && item->front().is_object()) {
      text += "[\n";
      for (size_t i = 0; i < item->size(); ++i) text += (*item)[i].dump() + (i + 1 < item->size() ? ",\n" : "\n");
      text += "]";
    } else {
      text += item->dump();
    }
  }
  text += "\n}\n";
  std::FILE* const file = std::fopen(path.c_str(), "w");
  if (file == nullptr) Fail({StatusCode::kIoError, "cannot write " + path});
  std::fwrite(text.data(), 1, text.size(), file);
  std::fclose(file);
}

}  // namespace prehoc
