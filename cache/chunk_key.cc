#include "cache/chunk_key.h"

#include <openssl/evp.h>

#include <bit>
#include <memory>

#include "base/check.h"

namespace prehoc {
namespace {

static_assert(std::endian::native == std::endian::little, "integers are hashed as they lie in memory");

// A libcrypto without SHA-256 cannot form keys at all, and no input of ours makes a digest fail: hence the checks.
class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new()) {
    PREHOC_CHECK(context_ != nullptr);
    PREHOC_CHECK(EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
  }

  void Add(const void* data, size_t size) { PREHOC_CHECK(EVP_DigestUpdate(context_.get(), data, size) == 1); }
  void AddCount(uint64_t count) { Add(&count, sizeof count); }
  void AddPart(const void* data, size_t size) {
    AddCount(size);
    Add(data, size);
  }
  void AddPart(std::string_view text) { AddPart(text.data(), text.size()); }

  ChainHash Finish() {
    ChainHash hash{};
    unsigned size = 0;
    PREHOC_CHECK(EVP_DigestFinal_ex(context_.get(), hash.data(), &size) == 1);
    PREHOC_CHECK(size == hash.size());
    return hash;
  }

 private:
  struct Free {
    void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
  };
  std::unique_ptr<EVP_MD_CTX, Free> context_;
};

}  // namespace

ChunkKeyChain::ChunkKeyChain(const ChunkKeyRoot& root) {
  Sha256 hash;
  hash.AddPart("prehoc chunk key 1");
  hash.AddPart(root.tenant_salt);
  hash.AddPart(root.model.data(), root.model.size());
  hash.AddPart(root.dtype);
  hash.AddPart(root.layout);
  hash.AddPart(root.method);
  root_ = hash.Finish();
  Sha256 tenant;
  tenant.AddPart("prehoc tenant 1");
  tenant.AddPart(root.tenant_salt);
  tenant_ = ChainTag(tenant.Finish());
}

void ChunkKeyChain::Append(std::span<const int32_t> tokens, std::string_view branch) {
  const ChainHash& before = chain_.empty() ? root_ : chain_.back();
  Sha256 hash;
  hash.Add(before.data(), before.size());
  hash.AddCount(tokens.size());
  hash.Add(tokens.data(), tokens.size_bytes());
  hash.AddPart(branch);
  if (!branch.empty() && first_branch_ < 0) first_branch_ = size();
  chain_.push_back(hash.Finish());
}

ChunkKey ChunkKeyChain::Key(ChunkIndex chunk, LayerId layer) const {
  PREHOC_CHECK(chunk.valid() && chunk.value() < size());
  PREHOC_CHECK(layer.valid());
  return {chain_[static_cast<size_t>(chunk.value())], layer.value()};
}

ChunkOrigin ChunkKeyChain::Origin(ChunkIndex chunk) const {
  PREHOC_CHECK(chunk.valid() && chunk.value() < size());
  const auto at = static_cast<size_t>(chunk.value());
  return {.tenant = tenant_, .parent = ChainTag(at == 0 ? root_ : chain_[at - 1]), .chunk = chunk.value(),
          .branch = first_branch_ >= 0 && chunk.value() >= first_branch_};
}

ChunkKeyChain ChainOf(const ChunkKeyRoot& root, std::span<const int32_t> tokens, int32_t chunk_tokens) {
  PREHOC_CHECK(chunk_tokens > 0);
  const auto step = static_cast<size_t>(chunk_tokens);
  ChunkKeyChain chain(root);
  for (size_t first = 0; first + step <= tokens.size(); first += step) chain.Append(tokens.subspan(first, step));
  return chain;
}

}  // namespace prehoc
