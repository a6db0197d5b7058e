#include "integrations/reference/loader/lora.h"

#include <atomic>
#include <filesystem>
#include <new>

#include "integrations/reference/loader/assemble.h"
#include "integrations/reference/loader/huggingface_config.h"
#include "integrations/reference/loader/json.h"
#include "integrations/reference/loader/lora_config.h"
#include "integrations/reference/loader/lora_merge.h"
#include "integrations/reference/loader/mapped_file.h"
#include "integrations/reference/loader/safetensors.h"
#include "integrations/reference/loader/text.h"

namespace prehoc::reference::loader {
namespace {

WeightMatrix* MatrixOf(LayerWeights* layer, LoraModule module) {
  WeightMatrix* const matrices[] = {&layer->q, &layer->k, &layer->v, &layer->o, &layer->gate, &layer->up, &layer->down};
  return matrices[static_cast<size_t>(module)];
}

// Bytes that nobody has written yet: pages are first touched by the threads that fill them.
std::shared_ptr<std::byte> AllocateForOverwrite(size_t bytes) {
  constexpr std::align_val_t kAlignment{64};
  auto* p = static_cast<std::byte*>(::operator new(bytes, kAlignment));
  return {p, [](std::byte* q) { ::operator delete(q, kAlignment); }};
}

// One matrix on its way from `base` to `out`.
struct Merge {
  WeightMatrix* target = nullptr;
  WeightMatrix base;
  LoraFactors factors;
  std::shared_ptr<std::byte> out;
  size_t out_row_bytes = 0;
  std::string name;  // of the adapter's tensors, for messages
};

class Merger {
 public:
  Merger(const LoraConfig& config, TensorTable* tensors, Executor* executor, Model* model)
      : config_(config), tensors_(*tensors), executor_(*executor), model_(*model) {}

  Status MergeLayer(size_t layer) {
    std::vector<Merge> merges;
    for (const LoraModule module : config_.modules) {
      PREHOC_ASSIGN_OR_RETURN(auto merge, Prepare(layer, module));
      merges.push_back(std::move(merge));
    }
    PREHOC_RETURN_IF_ERROR(Run(merges));
    for (Merge& m : merges) {
      *m.target = {MergedType(m.base.type), m.base.rows, m.base.cols, m.out.get(), m.out_row_bytes};
      model_.owners.push_back(std::move(m.out));
    }
    return {};
  }

 private:
  static constexpr int64_t kRowsPerTask = 64;

  Result<Merge> Prepare(size_t layer, LoraModule module) {
    Merge m;
    m.target = MatrixOf(&model_.layers[layer], module);
    m.base = *m.target;
    m.name = Cat("base_model.model.model.layers.", layer, ".", kLoraModuleNames[static_cast<size_t>(module)]);
    m.factors.rank = config_.rank;
    m.factors.scale = static_cast<float>(config_.scale);
    PREHOC_ASSIGN_OR_RETURN(const WeightMatrix a, tensors_.Matrix(m.name + ".lora_A.weight", config_.rank, m.base.cols));
    PREHOC_ASSIGN_OR_RETURN(const WeightMatrix b, tensors_.Matrix(m.name + ".lora_B.weight", m.base.rows, config_.rank));
    m.factors.a = Expanded(a, 0);
    const bool interleaved = model_.config.rope_layout == RopeLayout::kInterleaved &&
                             (module == LoraModule::kQ || module == LoraModule::kK);
    m.factors.b = Expanded(b, interleaved ? model_.config.head_dim : 0);
    PREHOC_ASSIGN_OR_RETURN(m.out_row_bytes, WeightRowBytes(MergedType(m.base.type), m.base.cols));
    m.out = AllocateForOverwrite(m.out_row_bytes * static_cast<size_t>(m.base.rows));
    return m;
  }

  // As fp32; with a head size, in the row order of interleaved RoPE.
  static std::vector<float> Expanded(const WeightMatrix& m, int64_t interleaved_head_dim) {
    std::vector<float> out(static_cast<size_t>(m.rows * m.cols));
    for (int64_t r = 0; r < m.rows; ++r) {
      const int64_t from = interleaved_head_dim > 0 ? HuggingFaceRowOfInterleaved(r, interleaved_head_dim) : r;
      DequantizeRow(m.type, m.row(from), m.cols, out.data() + r * m.cols);
    }
    return out;
  }

  Status Run(const std::vector<Merge>& merges) {
    struct Task {
      size_t merge;
      int64_t first, count;
    };
    std::vector<Task> tasks;
    for (size_t i = 0; i < merges.size(); ++i) {
      for (int64_t row = 0; row < merges[i].base.rows; row += kRowsPerTask) {
        tasks.push_back({i, row, std::min(kRowsPerTask, merges[i].base.rows - row)});
      }
    }
    constexpr size_t kNone = SIZE_MAX;
    std::atomic<size_t> bad{kNone};
    executor_.ParallelFor(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
      const Task& t = tasks[static_cast<size_t>(i)];
      const Merge& m = merges[t.merge];
      std::byte* out = m.out.get() + static_cast<size_t>(t.first) * m.out_row_bytes;
      if (!MergeRows(m.base, m.factors, t.first, t.count, out)) bad.store(t.merge, std::memory_order_relaxed);
    });
    if (bad.load() == kNone) return {};
    return FileError(StatusCode::kCorrupt, tensors_.file(), "merging ", Quoted(merges[bad.load()].name),
                     " gives values that are not finite as ", WeightTypeName(MergedType(merges[bad.load()].base.type)));
  }

  const LoraConfig& config_;
  TensorTable& tensors_;
  Executor& executor_;
  Model& model_;
};

Status ApplyOverrides(const std::string& path, ModelConfig* config) {
  const auto text = ReadTextFile(path, kMaxJsonBytes);
  if (!text.ok()) return text.status().code() == StatusCode::kNotFound ? Status() : text.status();
  return ApplyConfigOverrides(*text, path, config);
}

}  // namespace

Status MergeLora(const std::string& directory, Executor& executor, const std::function<void(double)>& progress,
                 Model* model) {
  const std::string config_path = directory + "/adapter_config.json", weights_path = directory + "/adapter_model.safetensors";
  PREHOC_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(config_path, kMaxJsonBytes));
  PREHOC_ASSIGN_OR_RETURN(const LoraConfig config, ReadLoraConfig(text, config_path));
  PREHOC_ASSIGN_OR_RETURN(const auto file, MappedFile::Open(weights_path));
  TensorTable tensors(weights_path);
  PREHOC_RETURN_IF_ERROR(AddSafetensors(file, &tensors));
  PREHOC_RETURN_IF_ERROR(ApplyOverrides(directory + "/config_overrides.json", &model->config));
  Merger merger(config, &tensors, &executor, model);
  for (size_t layer = 0; layer < model->layers.size(); ++layer) {
    PREHOC_RETURN_IF_ERROR(merger.MergeLayer(layer));
    if (progress) progress(static_cast<double>(layer + 1) / static_cast<double>(model->layers.size()));
  }
  PREHOC_RETURN_IF_ERROR(tensors.CheckAllUsed());
  model->config.name += " + " + std::filesystem::path(directory).lexically_normal().filename().string();
  model->weight_bytes = WeightBytes(*model);
  return {};
}

}  // namespace prehoc::reference::loader
