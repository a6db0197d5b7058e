// How rows lie in host memory and in the store. The device holds fp16 rows, and whoever attends sees them: every stored format has one fp16 row for
// what it holds, and no other is ever used (kernels/row_codec.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace prehoc {

// The values are those of stored records (docs/formats.md).
enum class RowFormat : uint8_t {
  kF16 = 1,   // K then V [head_dim] fp16
  kInt8 = 2,  // a scale (fp16) for each 32 channels of K, then of V, padded to 16 bytes; then K, then V, a signed byte a channel
  kE4m3 = 3,  // K then V, an fp8 (e4m3fn) a channel: as engines with an fp8 cache hold them, with a scale of 1
};
inline constexpr int32_t kScaledChannels = 32;  // of kInt8 that share a scale; the last ones of a head_dim may be 16

constexpr bool IsRowFormat(RowFormat format) { return format >= RowFormat::kF16 && format <= RowFormat::kE4m3; }
constexpr std::string_view RowFormatName(RowFormat format) {
  return format == RowFormat::kF16 ? "f16" : format == RowFormat::kInt8 ? "int8" : "e4m3";
}
constexpr std::optional<RowFormat> FindRowFormat(std::string_view name) {
  for (const RowFormat format : {RowFormat::kF16, RowFormat::kInt8, RowFormat::kE4m3}) {
    if (RowFormatName(format) == name) return format;
  }
  return std::nullopt;
}

// Of kInt8: scales of K, as many of V behind them; and where its bytes begin.
constexpr size_t RowScales(int32_t head_dim) { return static_cast<size_t>((head_dim + kScaledChannels - 1) / kScaledChannels); }
constexpr size_t RowScaleBytes(int32_t head_dim) { return (4 * RowScales(head_dim) + 15) / 16 * 16; }
// Of a row: K and V of one token of one KV head. A multiple of 16.
constexpr size_t RowBytes(RowFormat format, int32_t head_dim) {
  const size_t channels = size_t{2} * static_cast<size_t>(head_dim);
  switch (format) {
    case RowFormat::kF16: return 2 * channels;
    case RowFormat::kInt8: return RowScaleBytes(head_dim) + channels;
    case RowFormat::kE4m3: return channels;
  }
  return 0;
}

}  // namespace prehoc
