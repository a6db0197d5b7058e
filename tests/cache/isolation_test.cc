// Over all pairs of what may differ between two users of one store: they share exactly what is the same for both.
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "cache/chunk_key.h"
#include "tests/cache/pipeline_world.h"

namespace prehoc {
namespace {

std::vector<std::string> MethodTags() {
  std::set<std::string> tags;
  for (const SelectorKind kind : {SelectorKind::kDense, SelectorKind::kWindow, SelectorKind::kOracle, SelectorKind::kCis, SelectorKind::kPsaw,
                                  SelectorKind::kEtf, SelectorKind::kCpe, SelectorKind::kSharedCandidates, SelectorKind::kTwoClock,
                                  SelectorKind::kQuest, SelectorKind::kHShare}) {
    SelectorOptions options;
    options.kind = kind;
    const auto selector = Selector::Create(options).value();
    for (const int64_t prompt : {100, 5000}) {
      for (const char* rope : {"", "rope=8192;", "rope=131072;"}) tags.insert(rope + selector->MethodTag(prompt));
    }
  }
  return {tags.begin(), tags.end()};
}

TEST(IsolationTest, NoTwoRootsHaveAKeyInCommon) {
  const std::vector<std::string> methods = MethodTags();
  EXPECT_GT(methods.size(), 6u);
  const std::vector<int32_t> tokens{1, 2, 3, 4};
  std::set<ChunkKey> keys;
  std::set<uint64_t> tenants;
  size_t roots = 0;
  for (const char* tenant : {"", "a", "b", "ab", "a\n"}) {
    for (uint8_t model = 0; model < 4; ++model) {
      for (const char* layout : {"rows-kv/l3/h2/d16/p16/c64", "rows-kv/l3/h2/d16/p16/c32", "rows-kv/l3/h4/d16/p16/c64"}) {
        for (const char* dtype : {"f16", "f8"}) {
          for (const std::string& method : methods) {
            ChunkKeyRoot root{.tenant_salt = tenant, .dtype = dtype, .layout = layout, .method = method};
            root.model[0] = model;
            const ChunkKeyChain chain = ChainOf(root, tokens, 2);
            for (const int32_t chunk : {0, 1}) keys.insert(chain.Key(ChunkIndex(chunk), LayerId(0)));
            tenants.insert(chain.Origin(ChunkIndex(0)).tenant);
            ++roots;
          }
        }
      }
    }
  }
  EXPECT_EQ(keys.size(), 2 * roots) << "one of " << roots * (roots - 1) / 2 << " pairs";
  EXPECT_EQ(tenants.size(), 5u) << "a tenant's tag depends on its salt alone";
}

TEST(IsolationTest, OriginsSayWhereChunksStand) {
  ChunkKeyChain chain({.tenant_salt = "t"});
  const std::vector<int32_t> tokens(4, 1);
  chain.Append(tokens);
  chain.Append(tokens);
  chain.Append(tokens, "branch");
  chain.Append(tokens);
  for (int32_t i = 0; i < 4; ++i) {
    const ChunkOrigin origin = chain.Origin(ChunkIndex(i));
    EXPECT_EQ(origin.chunk, i);
    EXPECT_EQ(origin.branch, i >= 2) << "what follows a branch belongs to it";
    EXPECT_EQ(origin.tenant, chain.Origin(ChunkIndex(0)).tenant);
    if (i > 0) {
      EXPECT_EQ(origin.parent, ChainTag(chain.Key(ChunkIndex(i - 1), LayerId(0)).chain));
    }
  }
}

// Each of these fills one store in turn; then each looks for its prompt, and for those of all others.
TEST(IsolationTest, OfAllPairsOnlyEqualsShare) {
  struct User {
    std::string tenant;
    uint8_t model;
    SelectorKind kind;
    std::string variant;
  };
  std::vector<User> users;
  for (const char* tenant : {"", "a", "b"}) {
    for (const uint8_t model : {0, 1}) {
      for (const SelectorKind kind : {SelectorKind::kDense, SelectorKind::kTwoClock, SelectorKind::kPsaw, SelectorKind::kEtf, SelectorKind::kCpe}) {
        for (const char* variant : {"", "rope=8192;"}) users.push_back({tenant, model, kind, variant});
      }
    }
  }
  constexpr int64_t kTokens = 130;
  const Stream stream(SmallGeometry(), kTokens, 11);
  ManualExecutor executor;
  HostDeviceMemory device(64 << 20);
  const auto cache_of = [&](const User& user, ChunkStore* store) {
    CacheOptions options = WorldOptions::Default().cache;
    options.host_budget = 1 << 20;
    options.tenant_salt = user.tenant;
    options.model[0] = user.model;
    options.selector.kind = user.kind;
    CacheResources resources;
    resources.executor = &executor;
    resources.device = &device;
    resources.store = store;
    return KvCache::Create(options, resources).value();
  };
  // What decides K and V, as one text.
  const auto identity = [&](const User& user) {
    SelectorOptions options = WorldOptions::Default().cache.selector;
    options.kind = user.kind;
    return user.tenant + "|" + std::to_string(user.model) + "|" + user.variant + Selector::Create(options).value()->MethodTag(kTokens);
  };
  int pairs = 0, shared = 0;
  for (const User& owner : users) {
    MemoryChunkStore::Options options;
    options.chunk_bytes = SmallGeometry().block_bytes();
    options.identity.layout = SmallGeometry().LayoutName();
    const auto store = MemoryChunkStore::Create(options).value();
    {
      const auto cache = cache_of(owner, store.get());
      const auto sequence = cache->Open({.max_tokens = kTokens, .variant = owner.variant}).value();
      ASSERT_OK(PrefillAll(*sequence, stream, kTokens, 64));
      ASSERT_OK(cache->Flush());
    }
    for (const User& user : users) {
      const auto cache = cache_of(user, store.get());
      const auto sequence = cache->OpenWithPrefix({.max_tokens = kTokens, .variant = user.variant}, stream.ids(0, kTokens)).value();
      const bool same = identity(owner) == identity(user);
      EXPECT_EQ(sequence->restored(), same ? 128 : 0) << identity(owner) << " and " << identity(user);
      ++pairs;
      shared += same;
    }
  }
  EXPECT_EQ(pairs, 3600);
  EXPECT_GT(shared, 60) << "two selectors that leave K and V alone share";
}

}  // namespace
}  // namespace prehoc
