#include "cache/chunk_key.h"

#include <gtest/gtest.h>

#include <climits>
#include <set>
#include <string>
#include <vector>

#include "tests/support/seeded_rng.h"

namespace prehoc {
namespace {

ChunkKeyRoot TestRoot() {
  ChunkKeyRoot root;
  root.tenant_salt = "tenant";
  for (size_t i = 0; i < root.model.size(); ++i) root.model[i] = static_cast<uint8_t>(i);
  root.dtype = "f16";
  root.layout = "rows-kv/l2/h2/d16/p16/c64";
  root.method = "psaw c=0.9";
  return root;
}

std::string Hex(const ChunkKey& key) {
  std::string text;
  for (const uint8_t byte : key.chain) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

ChunkKey KeyOf(const ChunkKeyChain& chain, int chunk) { return chain.Key(ChunkIndex(chunk), LayerId(0)); }

std::vector<int32_t> Tokens(Rng& rng, size_t count) {
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(rng.Int(0, 49151));
  return tokens;
}

// Keys outlive programs: these were computed with
//   import hashlib, struct
//   def part(x): return struct.pack("<Q", len(x)) + x
//   def root(*parts): return hashlib.sha256(b"".join(map(part, (b"prehoc chunk key 1",) + parts))).digest()
//   def link(before, tokens, branch=b""):
//     return hashlib.sha256(before + struct.pack("<Q%di" % len(tokens), len(tokens), *tokens) + part(branch)).digest()
//   r = root(b"tenant", bytes(range(32)), b"f16", b"rows-kv/l2/h2/d16/p16/c64", b"psaw c=0.9")
//   a = link(r, [1, 2, 3, -1]); b = link(a, [49151, 0, 7, 2**31 - 1], b"sparse 5")
//   link(root(b"", bytes(32), b"", b"", b""), [])
TEST(ChunkKeyTest, IsTheHashThatTheFormatSays) {
  ChunkKeyChain chain(TestRoot());
  chain.Append(std::vector<int32_t>{1, 2, 3, -1});
  chain.Append(std::vector<int32_t>{49151, 0, 7, INT32_MAX}, "sparse 5");
  EXPECT_EQ(Hex(KeyOf(chain, 0)), "081e43e995067c82512bde70fce62994eaac76e0cb87b9b253cd0f1db42ad633");
  EXPECT_EQ(Hex(KeyOf(chain, 1)), "63cf403259710aa9878ee750802ff0187e8a6e9e1887776133c595941f6b3cf5");

  ChunkKeyChain bare((ChunkKeyRoot()));
  bare.Append({});
  EXPECT_EQ(Hex(KeyOf(bare, 0)), "cb9af1a519c1aa2f49151e31b321cb4822cb9e0396a0ef9b2eb4d1defce50101");
}

TEST(ChunkKeyTest, ALayerIsPartOfTheKeyAndNotOfTheChain) {
  ChunkKeyChain chain(TestRoot());
  chain.Append(std::vector<int32_t>{1});
  const ChunkKey first = chain.Key(ChunkIndex(0), LayerId(0)), second = chain.Key(ChunkIndex(0), LayerId(7));
  EXPECT_EQ(first.chain, second.chain);
  EXPECT_EQ(second.layer, 7);
  EXPECT_NE(first, second);
}

TEST(ChunkKeyTest, APrefixHasTheKeysOfItsWhole) {
  SeededRng rng;
  const std::vector<int32_t> tokens = Tokens(rng, 1000);
  const ChunkKeyChain whole = ChainOf(TestRoot(), tokens, 64);
  ASSERT_EQ(whole.size(), 15);  // 40 tokens are left over
  for (const size_t length : {size_t{0}, size_t{63}, size_t{64}, size_t{65}, size_t{640}, size_t{999}}) {
    const ChunkKeyChain part = ChainOf(TestRoot(), std::span(tokens).first(length), 64);
    ASSERT_EQ(part.size(), static_cast<int64_t>(length / 64));
    for (int i = 0; i < part.size(); ++i) EXPECT_EQ(KeyOf(part, i), KeyOf(whole, i)) << length << " " << i;
  }
  ChunkKeyChain grown(TestRoot());
  for (size_t i = 0; i < 15; ++i) grown.Append(std::span(tokens).subspan(i * 64, 64));
  for (int i = 0; i < 15; ++i) EXPECT_EQ(KeyOf(grown, i), KeyOf(whole, i));
}

TEST(ChunkKeyTest, EveryTokenChangesItsKeyAndAllThatFollow) {
  SeededRng rng;
  const std::vector<int32_t> tokens = Tokens(rng, 64);
  const ChunkKeyChain original = ChainOf(TestRoot(), tokens, 16);
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::vector<int32_t> changed = tokens;
    changed[i] ^= 1 << rng.Int(0, 30);
    const ChunkKeyChain other = ChainOf(TestRoot(), changed, 16);
    for (int chunk = 0; chunk < 4; ++chunk) {
      EXPECT_EQ(KeyOf(other, chunk) == KeyOf(original, chunk), chunk < static_cast<int>(i / 16)) << i << " " << chunk;
    }
  }
}

TEST(ChunkKeyTest, EveryPartOfTheRootChangesEveryKey) {
  const std::vector<int32_t> tokens{1, 2, 3, 4};
  std::set<ChunkKey> keys;
  const auto add = [&](auto change) {
    ChunkKeyRoot root = TestRoot();
    change(root);
    const ChunkKeyChain chain = ChainOf(root, tokens, 2);
    keys.insert(KeyOf(chain, 0));
    keys.insert(KeyOf(chain, 1));
  };
  add([](ChunkKeyRoot&) {});
  add([](ChunkKeyRoot& r) { r.tenant_salt = "tenanu"; });
  add([](ChunkKeyRoot& r) { r.tenant_salt = ""; });
  add([](ChunkKeyRoot& r) { r.model[31] ^= 1; });
  add([](ChunkKeyRoot& r) { r.dtype = "f8"; });
  add([](ChunkKeyRoot& r) { r.layout = "rows-kv/l2/h2/d16/p16/c65"; });
  add([](ChunkKeyRoot& r) { r.method = ""; });
  EXPECT_EQ(keys.size(), 14u);
}

TEST(ChunkKeyTest, PartsNeverRunTogether) {
  std::set<ChunkKey> keys;
  const auto add = [&](std::string_view salt, std::string_view dtype, std::string_view layout, std::string_view method) {
    ChunkKeyRoot root;
    root.tenant_salt = salt;
    root.dtype = dtype;
    root.layout = layout;
    root.method = method;
    keys.insert(KeyOf(ChainOf(root, std::vector<int32_t>{5}, 1), 0));
  };
  add("a", "bc", "d", "e");
  add("ab", "c", "d", "e");
  add("a", "b", "cd", "e");
  add("a", "b", "c", "de");
  add("a", "bcde", "", "");
  add("", "", "", "abcde");
  add(std::string_view("a\0", 2), "bc", "d", "e");
  EXPECT_EQ(keys.size(), 7u);
}

TEST(ChunkKeyTest, TokensAndBranchNeverRunTogether) {
  const auto key = [](std::vector<int32_t> tokens, std::string_view branch) {
    ChunkKeyChain chain(TestRoot());
    chain.Append(tokens, branch);
    return KeyOf(chain, 0);
  };
  // Tokens whose bytes are the length of a branch and the branch: 4, 0, "abcd".
  const int32_t abcd = 'a' | 'b' << 8 | 'c' << 16 | 'd' << 24;
  std::set<ChunkKey> keys{key({1}, "abcd"),        key({1, 4, 0, abcd}, ""), key({1}, ""), key({1, 0}, ""),
                          key({1, 0, 0}, ""),      key({1, 4, 0}, "abcd"),   key({}, ""),  key({}, "abcd")};
  EXPECT_EQ(keys.size(), 8u);
}

TEST(ChunkKeyTest, TwoShortChunksAreNotOneLongOne) {
  const std::vector<int32_t> tokens{1, 2, 3, 4};
  const ChunkKeyChain two = ChainOf(TestRoot(), tokens, 2), one = ChainOf(TestRoot(), tokens, 4);
  EXPECT_NE(KeyOf(two, 1), KeyOf(one, 0));
}

TEST(ChunkKeyTest, ABranchChangesItsKeyAndAllThatFollow) {
  const std::vector<int32_t> tokens{1, 2, 3, 4};
  ChunkKeyChain dense(TestRoot());
  dense.Append(tokens);
  ChunkKeyChain sparse = dense;  // a copy continues apart
  dense.Append(tokens);
  dense.Append(tokens);
  sparse.Append(tokens, "sparse");
  sparse.Append(tokens);
  EXPECT_EQ(KeyOf(dense, 0), KeyOf(sparse, 0));
  EXPECT_NE(KeyOf(dense, 1), KeyOf(sparse, 1));
  EXPECT_NE(KeyOf(dense, 2), KeyOf(sparse, 2));
  EXPECT_NE(KeyOf(dense, 0), KeyOf(dense, 1)) << "equal tokens at another place are another chunk";
}

TEST(ChunkKeyDeathTest, AsksForChunksThatExist) {
  ChunkKeyChain chain(TestRoot());
  EXPECT_DEATH(static_cast<void>(KeyOf(chain, 0)), "chunk");
  chain.Append(std::vector<int32_t>{1});
  EXPECT_DEATH(static_cast<void>(chain.Key(ChunkIndex(0), LayerId())), "layer");
}

}  // namespace
}  // namespace prehoc
