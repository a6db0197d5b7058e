#include "kernels/cuda/prefill_rows.h"

#include <algorithm>
#include <limits>

#include "base/check.h"
#include "base/cuda/error.h"
#include "base/units.h"
#include "kernels/cuda/run_kernels.h"

namespace prehoc::cuda {
namespace {
// Buffers grow piece by piece of a prompt: in steps, as each waits for the device.
constexpr size_t kGrain = size_t{1} << 20;
size_t Grown(size_t wanted, size_t has) { return RoundUp(std::max(wanted, std::min(has + has / 4, 2 * wanted)), kGrain); }

Status Grow(size_t size, std::optional<CudaBytes>* bytes) {
  if (bytes->has_value() && (*bytes)->size() >= size) return {};
  const size_t has = bytes->has_value() ? (*bytes)->size() : 0;
  bytes->reset();
  PREHOC_ASSIGN_OR_RETURN(CudaBytes made, CudaBytes::Create(CudaPlace::kDevice, Grown(size, has)));
  bytes->emplace(std::move(made));
  return {};
}
}  // namespace

Result<PrefillRows> PrefillRows::Create(const CudaDeviceMemory* memory, cudaStream_t kernels) {
  PREHOC_ASSIGN_OR_RETURN(CudaStream out, CudaStream::Create());
  PREHOC_ASSIGN_OR_RETURN(CudaStream in, CudaStream::Create());
  PrefillRows rows(memory, kernels, std::move(out), std::move(in));
  const auto make = [](std::optional<CudaEvent>& event) -> Status {
    PREHOC_ASSIGN_OR_RETURN(CudaEvent made, CudaEvent::Create());
    event.emplace(std::move(made));
    return {};
  };
  for (const int i : {0, 1}) {
    for (auto* event : {&rows.sets_[i].written, &rows.sets_[i].left, &rows.buffers_[i].filled, &rows.buffers_[i].used}) {
      PREHOC_RETURN_IF_ERROR(make(*event));
    }
  }
  return rows;
}

// --- to the host --------------------------------------------------------------------------------------------------------

Status PrefillRows::BeginSet(size_t bytes) {
  Set& set = sets_[filling_];
  if (set.sent) PREHOC_RETURN_IF_ERROR(Leave(set));
  set.parts.clear();
  set.used = 0;
  return Grow(bytes, &set.bytes);
}

std::byte* PrefillRows::Add(std::byte* host, size_t bytes, bool joins) {
  Set& set = sets_[filling_];
  const size_t at = set.used;
  set.used += bytes;
  PREHOC_CHECK(set.used <= set.bytes->size());
  Part* const last = set.parts.empty() ? nullptr : &set.parts.back();
  if (joins && last != nullptr && last->host + last->size == host) {
    last->size += bytes;
  } else {
    set.parts.push_back({host, at, bytes});
  }
  return set.bytes->data() + at;
}

Status PrefillRows::Send() {
  Set& set = sets_[filling_];
  if (set.parts.empty()) return {};
  set.sent = true;
  filling_ ^= 1;
  std::sort(set.parts.begin(), set.parts.end(), [](const Part& a, const Part& b) { return a.host < b.host; });
  PREHOC_RETURN_IF_ERROR(set.written->Record(kernels_));
  PREHOC_RETURN_IF_ERROR(set.written->Before(out_.get()));
  for (const Part& part : set.parts) {
    PREHOC_CUDA_TRY(cudaMemcpyAsync(part.host, set.bytes->data() + part.at, part.size, cudaMemcpyDeviceToHost, out_.get()));
    copied_ += static_cast<int64_t>(part.size);
  }
  return set.left->Record(out_.get());
}

const std::byte* PrefillRows::Find(const std::byte* host, size_t* size) const {
  for (const Set& set : sets_) {
    if (!set.sent) continue;
    const auto next = std::upper_bound(set.parts.begin(), set.parts.end(), host,
                                       [](const std::byte* at, const Part& part) { return at < part.host; });
    if (next != set.parts.begin()) {
      const Part& part = *std::prev(next);
      const auto offset = static_cast<size_t>(host - part.host);
      if (offset < part.size) {
        *size = std::min(*size, part.size - offset);
        return set.bytes->data() + part.at + offset;
      }
    }
    if (next != set.parts.end()) *size = std::min(*size, static_cast<size_t>(next->host - host));
  }
  return nullptr;
}

Status PrefillRows::Leave(Set& set) {
  set.sent = false;
  return set.left->Synchronize();
}

Status PrefillRows::Arrive(int32_t but) {
  Set &newer = sets_[filling_ ^ 1], &older = sets_[filling_];
  if (older.sent && but < 2) PREHOC_RETURN_IF_ERROR(Leave(older));
  if (newer.sent && but < 1) PREHOC_RETURN_IF_ERROR(Leave(newer));
  return {};
}

// --- from the host ------------------------------------------------------------------------------------------------------

Status PrefillRows::MakeRoom(Buffer& buffer, size_t size) {
  PREHOC_RETURN_IF_ERROR(Grow(size, &buffer.bytes));
  return buffer.used->Before(in_.get());  // an event that was never recorded is past
}

Status PrefillRows::Copy(std::span<const std::span<const RowRun>> tasks, int64_t from, int64_t to, size_t row, size_t pitch, std::byte* data) {
  struct Cursor {
    size_t run = 0;
    int64_t before = 0;  // rows of the runs before it
    const std::byte* source = nullptr;
    bool here = false;   // on the device
  };
  std::vector<Cursor> cursors(tasks.size());
  std::vector<EvenPieces> on_device;  // copied by one kernel in its order
  for (int64_t at = from; at < to;) {
    // As far as every task's rows run on in one place.
    int64_t count = to - at;
    for (size_t i = 0; i < tasks.size(); ++i) {
      Cursor& c = cursors[i];
      while (at >= c.before + tasks[i][c.run].count) c.before += tasks[i][c.run++].count;
      const RowRun& run = tasks[i][c.run];
      c.source = static_cast<const std::byte*>(run.rows) + static_cast<size_t>(at - c.before) * row;
      count = std::min(count, c.before + run.count - at);
      c.here = memory_->Owns(c.source);
      if (c.here) continue;
      size_t size = static_cast<size_t>(count) * row;
      const std::byte* const copy = Find(c.source, &size);
      count = std::min(count, static_cast<int64_t>(size / row));
      c.here = copy != nullptr;
      if (copy != nullptr) c.source = copy;
    }
    const size_t width = static_cast<size_t>(count) * row;
    std::byte* const target = data + static_cast<size_t>(at) * row;
    const std::ptrdiff_t gap = tasks.size() > 1 ? cursors[1].source - cursors[0].source : static_cast<std::ptrdiff_t>(width);
    constexpr size_t kMostPitch = std::numeric_limits<int32_t>::max();
    bool even = gap >= static_cast<std::ptrdiff_t>(width) && static_cast<size_t>(gap) <= kMostPitch && pitch <= kMostPitch;
    for (size_t i = 0; i < cursors.size(); ++i) {
      even = even && cursors[i].here == cursors[0].here && cursors[i].source - cursors[0].source == static_cast<std::ptrdiff_t>(i) * gap;
    }
    const size_t together = even ? cursors.size() : 1;
    for (size_t i = 0; i < cursors.size(); i += together) {
      const bool here = cursors[i].here;
      const size_t to_pitch = even ? pitch : width, from_pitch = even ? static_cast<size_t>(gap) : width;
      if (here) {
        on_device.push_back({cursors[i].source, target + i * pitch, static_cast<int64_t>(from_pitch), static_cast<int64_t>(to_pitch),
                             static_cast<int64_t>(width), static_cast<int32_t>(together)});
        continue;
      }
      PREHOC_CUDA_TRY(cudaMemcpy2DAsync(target + i * pitch, to_pitch, cursors[i].source, from_pitch, width, together, cudaMemcpyDefault, in_.get()));
      copied_ += static_cast<int64_t>(width * together);
    }
    at += count;
  }
  return CopyPieces(on_device, kernels_);
}

bool PrefillRows::WasReadAhead(std::span<const std::span<const RowRun>> tasks, size_t pitch) const {
  if (ahead_rows_ == 0 || ahead_.size() != tasks.size() || ahead_pitch_ != pitch) return false;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const std::vector<RowRun>& held = ahead_[i];
    if (held.size() > tasks[i].size()) return false;
    for (size_t r = 0; r < held.size(); ++r) {
      const RowRun& now = tasks[i][r];
      const bool last = r + 1 == held.size();
      if (now.rows != held[r].rows || now.count < held[r].count || (!last && now.count != held[r].count)) return false;
    }
  }
  return true;
}

Result<PrefillRows::Rows> PrefillRows::Gather(std::span<const std::span<const RowRun>> tasks, int64_t rows, size_t row) {
  const size_t pitch = static_cast<size_t>(rows) * row;
  const bool held = WasReadAhead(tasks, pitch) && ahead_rows_ <= rows;
  const int64_t from = held ? ahead_rows_ : 0;
  ahead_rows_ = 0;
  reading_ ^= 1;
  Buffer& buffer = buffers_[reading_];
  const auto fill = [&]() -> Status {
    if (!held) PREHOC_RETURN_IF_ERROR(MakeRoom(buffer, tasks.size() * pitch));
    PREHOC_RETURN_IF_ERROR(Copy(tasks, from, rows, row, pitch, buffer.bytes->data()));
    PREHOC_RETURN_IF_ERROR(buffer.filled->Record(in_.get()));
    return buffer.filled->Before(kernels_);
  };
  const Status status = fill();
  if (!status.ok()) {
    Stop().IgnoreError();  // the first error is told
    return status;
  }
  return Rows{buffer.bytes->data(), pitch};
}

Result<PrefillRows::Rows> PrefillRows::Widen(const Rows& gathered, size_t num_tasks, int64_t rows, int32_t head_dim, RowFormat format) {
  const size_t pitch = static_cast<size_t>(rows) * RowBytes(RowFormat::kF16, head_dim);
  Status status = Grow(num_tasks * pitch, &wide_);  // memory that goes is given back when what was enqueued is done
  if (status.ok()) {
    status = WidenTasks(gathered.data, gathered.pitch, wide_->data(), pitch, static_cast<int32_t>(num_tasks), rows, head_dim, format, kernels_);
  }
  if (!status.ok()) {
    Stop().IgnoreError();  // the first error is told
    return status;
  }
  return Rows{wide_->data(), pitch};
}

Status PrefillRows::Used() { return buffers_[reading_].used->Record(kernels_); }

Status PrefillRows::ReadAhead(std::span<const std::span<const RowRun>> tasks, int64_t rows, int64_t total, size_t row) {
  const size_t pitch = static_cast<size_t>(total) * row;
  Buffer& buffer = buffers_[reading_ ^ 1];
  ahead_rows_ = 0;
  const auto fill = [&]() -> Status {
    PREHOC_RETURN_IF_ERROR(MakeRoom(buffer, tasks.size() * pitch));
    return Copy(tasks, 0, rows, row, pitch, buffer.bytes->data());
  };
  const Status status = fill();
  if (!status.ok()) {
    Stop().IgnoreError();  // the first error is told
    return status;
  }
  ahead_.clear();
  for (const auto& runs : tasks) {
    std::vector<RowRun>& held = ahead_.emplace_back();
    int64_t left = rows;
    for (size_t r = 0; left > 0; ++r) {
      held.push_back({runs[r].rows, static_cast<int32_t>(std::min<int64_t>(left, runs[r].count))});
      left -= held.back().count;
    }
  }
  ahead_rows_ = rows;
  ahead_pitch_ = pitch;
  return {};
}

Status PrefillRows::Stop() {
  ahead_rows_ = 0;
  for (Set& set : sets_) set.sent = false;
  const Status out = out_.Synchronize();
  const Status in = in_.Synchronize();
  return out.ok() ? in : out;
}

void PrefillRows::Release() {
  for (Set& set : sets_) set.bytes.reset();
  for (Buffer& buffer : buffers_) buffer.bytes.reset();
  wide_.reset();
}

size_t PrefillRows::held_bytes() const {
  size_t held = wide_ ? wide_->size() : 0;
  for (const int i : {0, 1}) {
    if (sets_[i].bytes) held += sets_[i].bytes->size();
    if (buffers_[i].bytes) held += buffers_[i].bytes->size();
  }
  return held;
}

}  // namespace prehoc::cuda
