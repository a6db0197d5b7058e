// What stored rows (base/row_format.h) mean, exactly: every backend writes these bytes and reads these values.
//
// int8, of the channels x[i] that share a scale: s = max |x[i]| / 127 rounded up to fp16; code = x[i] / s rounded to nearest even (at most 126
// where fp16 does not have 127 s); the value is code * s rounded to fp16: off by s / 2 and that rounding. A channel that is not finite makes all that share its scale NaN: it must not
// look like an answer.
// e4m3: x rounded to nearest even; beyond 464, where the largest value is 448, and for all that is not finite, NaN. Every value is one of fp16.
#pragma once
#include <cstddef>

#include "base/half.h"
#include "base/row_format.h"

namespace prehoc {

Half E4m3ToHalf(uint8_t code);
uint8_t HalfToE4m3(Half value);

// row [2, head_dim] to `stored` [RowBytes(format, head_dim)], and back. kF16 is a copy.
void NarrowRow(const Half* row, RowFormat format, int32_t head_dim, void* stored);
void WidenRow(const void* stored, RowFormat format, int32_t head_dim, Half* row);

}  // namespace prehoc
