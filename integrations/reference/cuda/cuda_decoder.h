// The engine's layers on the current CUDA device, attention with the backend. In a prompt q, k, v and the output stay on the device if the
// backend takes them there, which then follows the layers' stream; else they go through pinned memory, with one wait of the CPU a layer beside
// the backend's own.
#pragma once
#include "integrations/reference/engine/engine.h"
#include "integrations/reference/engine/token_decoder.h"

namespace prehoc::reference {

// For EngineOptions::make_decoder. Expands the weights to fp16 or bf16 in device memory (device_model.h). Returns kNotFound without a
// device, kOutOfSpace, kCuda, kUnsupported. Run() returns kUnsupported where a rule freezes tokens (etf, cpe).
Result<std::unique_ptr<TokenDecoder>> MakeCudaDecoder(const Model& model, const EngineOptions& options);

}  // namespace prehoc::reference
