#include "integrations/cli/doctor.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/executor.h"
#include "base/units.h"
#include "integrations/cli/disk_speed.h"
#include "integrations/cli/exit_code.h"
#include "integrations/cli/format.h"
#include "integrations/cli/gpu_speed.h"
#include "integrations/cli/machine.h"
#include "integrations/cli/version.h"
#include "integrations/cli/versions.h"
#include "kernels/function_table.h"
#include "transfer/host_arena.h"

namespace prehoc::cli {
namespace {
namespace fs = std::filesystem;

#ifdef PREHOC_CUDA
constexpr const char* kBuild = "CUDA";
#else
constexpr const char* kBuild = "CPU";
#endif
constexpr uint64_t kGpuProbe = 256 * kMiB;

std::string Bytes(uint64_t bytes) { return FormatBytes(static_cast<double>(bytes)); }
std::string Rate(double bytes_per_second) { return fmt::format("{:.2f} GB/s", bytes_per_second * 1e-9); }

class Doctor {
 public:
  Doctor(const DoctorOptions& options, const Environment& environment, std::ostream& out, const Clock& clock)
      : options_(options), environment_(environment), out_(out), clock_(clock) {}

  Status Run() {
    PREHOC_ASSIGN_OR_RETURN(executor_, ThreadPool::Create({}));
    Machine();
    Kernels();
    Gpu();
    PREHOC_RETURN_IF_ERROR(HostMemory());
    PREHOC_RETURN_IF_ERROR(Disk());
    Files();
    Libraries();
    return {};
  }

 private:
  void Line(std::string_view name, std::string_view value) { out_ << fmt::format("{:<14}{}\n", name, value); }

  void Machine() {
    utsname system = {};
    uname(&system);
    Line("prehoc", fmt::format("{} ({} build)", kVersion, kBuild));
    Line("system", fmt::format("{} {} {}", system.sysname, system.release, system.machine));
    Line("CPU", CpuName());
    Line("threads", fmt::format("{}: one per CPU that this process may use; fewer with --threads", executor_->concurrency()));
    Line("memory", environment_.memory_bytes ? Bytes(environment_.memory_bytes) + " for this process; --device-budget and --host-budget must fit in it"
                                             : std::string("unknown: budgets are not checked against it"));
  }

  void Kernels() {
    std::string features, tables;
    for (const std::string& feature : CpuFeatures()) features += (features.empty() ? "" : " ") + feature;
    Line("CPU features", features.empty() ? "none that matter here" : features);
    for (const char* name : {"reference", "avx2", "avx512"}) {
      if (FindKernels(name)) tables += (tables.empty() ? "" : ", ") + std::string(name);
    }
    Line("kernels", fmt::format("{}: the fastest of those that run here ({}); another with --kernels", BestCpuKernels().name, tables));
  }

  void Gpu() {
    const std::string driver = FirstLine("/proc/driver/nvidia/version");
    if (driver.empty()) {
      Line("GPU", "none (no NVIDIA driver is loaded)");
    } else {
      Line("GPU driver", driver);
      std::error_code error;
      for (const auto& entry : fs::directory_iterator("/proc/driver/nvidia/gpus", error)) {
        const std::string model = FirstLine((entry.path() / "information").string());
        Line("GPU", model.substr(std::min(model.size(), model.find_first_not_of(" \t", model.find(':') + 1))));
      }
    }
    auto speed = MeasureGpu(kGpuProbe, *executor_, clock_);
    if (!speed.ok()) {
      Line("device tier", "host memory under its own budget: " + speed.status().message());
      return;
    }
    Line("device tier", fmt::format("{}, compute capability {}.{}, {} free of {}; the driver supports CUDA {}.{}", speed->name, speed->major, speed->minor,
                                    Bytes(speed->free_bytes), Bytes(speed->memory_bytes), speed->driver_version / 1000, speed->driver_version % 1000 / 10));
    Line("link", fmt::format("to the GPU {}, to the host {} (copies of 1 MiB, over {})", Rate(speed->to_device_rate), Rate(speed->to_host_rate), Bytes(kGpuProbe)));
    Line("rows", fmt::format("{} through the transfer engine: {:.1f} million rows of 512 bytes a second, in no order", Rate(speed->row_rate), speed->rows_per_second * 1e-6));
    std::string pieces;
    for (const PieceRate& rate : speed->pieces) {
      pieces += fmt::format("{}{} {} / {}", pieces.empty() ? "" : ", ", Bytes(rate.piece_bytes), Rate(rate.few), Rate(rate.many));
    }
    Line("calibration", fmt::format("the copy engine from pieces of {} on, a kernel below ({})", Bytes(speed->copy_engine_bytes), pieces));
    Line("GPU pinning", fmt::format("mapped, touched and pinned at {}", Rate(speed->pin_rate)));
  }

  // Asks for the memory that a host tier would take, and looks at what came.
  Status HostMemory() {
    constexpr uint64_t kProbe = 64 * kMiB;
    HostArena::Options arena;
    arena.block_bytes = kMiB;
    arena.budget = arena.extent_bytes = kProbe;
    arena.lock_memory = true;
    const int64_t start = clock_.NowNanos();
    auto created = HostArena::Create(arena, executor_.get());
    if (!created.ok()) return created.status().WithContext("host memory");
    const double seconds = clock_.SecondsSince(start);
    std::map<std::string, double> counters;
    (*created)->VisitCounters([&](std::string_view name, double value) { counters[std::string(name)] = value; });
    std::string mode = FirstLine("/sys/kernel/mm/transparent_hugepage/enabled");
    if (mode.empty()) mode = "unknown";
    const double huge = counters["host.huge_page_bytes"] / static_cast<double>(kProbe);
    Line("huge pages", fmt::format("{} of a probe of {} came in huge pages (kernel: {}); {}", FormatShare(huge), Bytes(kProbe), mode,
                                   huge > 0 ? "the host tier uses them" : "the host tier works without, somewhat slower"));
    Line("host memory", fmt::format("mapped and touched at {}", Rate(static_cast<double>(kProbe) / seconds)));
    const bool locked = counters["host.lock_failures"] == 0;
    rlimit limit = {};
    getrlimit(RLIMIT_MEMLOCK, &limit);
    const std::string allowed = limit.rlim_cur == RLIM_INFINITY ? "unlimited" : Bytes(limit.rlim_cur);
    Line("pinning", fmt::format("{} (limit: {}); --device cpu does not need it", locked ? "works" : "refused", allowed));
    return {};
  }

  // The directory itself, or the nearest one above it that exists.
  static std::string ExistingDirectory(fs::path path) {
    std::error_code error;
    path = fs::absolute(path, error);
    while (!fs::is_directory(path, error) && path.has_relative_path()) path = path.parent_path();
    return path.string();
  }

  Status Disk() {
    const std::string wanted = options_.store.empty() ? environment_.cache_dir : options_.store;
    const std::string directory = ExistingDirectory(wanted.empty() ? "." : wanted);
    PREHOC_ASSIGN_OR_RETURN(const DiskSpeed speed, MeasureDisk(directory, options_.test_bytes, *executor_, clock_));
    Line("disk", fmt::format("{} ({}), {} free", directory, speed.file_system, Bytes(speed.free_bytes)));
    Line("direct I/O", speed.direct ? "works; the store uses it" : "not offered here; the store reads through the page cache");
    Line("disk speed", fmt::format("write {}, read {} with {} threads, over {}", Rate(speed.write_rate), Rate(speed.read_rate),
                                   executor_->concurrency(), Bytes(options_.test_bytes)));
    return {};
  }

  void Files() {
    std::error_code error;
    const auto show = [&](const char* name, const std::string& path, const char* script) {
      const bool there = !environment_.cache_dir.empty() && fs::exists(path, error);
      Line(name, there ? path : std::string("missing; fetch it with ") + script);
    };
    show("model", environment_.models_dir() + "/SmolLM2-135M-Instruct.Q4_1.gguf", "scripts/fetch_model.sh");
    show("document", environment_.documents_dir() + "/king-james.txt", "scripts/fetch_document.sh");
  }

  void Libraries() {
    for (const auto& [name, version] : LibraryVersions()) Line(name, version);
  }

  const DoctorOptions& options_;
  const Environment& environment_;
  std::ostream& out_;
  const Clock& clock_;
  std::unique_ptr<ThreadPool> executor_;
};

}  // namespace

int RunDoctor(const DoctorOptions& options, const Environment& environment, std::ostream& out, std::ostream& err,
              const Clock& clock) {
  const Status status = Doctor(options, environment, out, clock).Run();
  if (!status.ok()) err << "prehoc: error: " << status.message() << std::endl;
  return ExitCodeOf(status.ok() ? status : RuntimeError(status, ""));
}

}  // namespace prehoc::cli
