// Host memory pinned by cudaHostRegister.
#pragma once
#include "base/host_registrar.h"

namespace prehoc {

// Of the device that is current at each call. Returns kUnsupported if the device would see the memory at another address.
class CudaHostRegistrar final : public HostRegistrar {
 public:
  Status Register(std::byte* data, size_t size) override;
  void Unregister(std::byte* data) override;
};

}  // namespace prehoc
