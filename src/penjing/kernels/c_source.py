"""The kernels in plain C99, for processors that LLVM does not know or that have no vectors.

Functions have the names, pointers and layouts of the kernels that TVM generates, with one lane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penjing.kernels.binary import Convolution, Layout
    from penjing.kernels.packed_weights import Product

POPCOUNT = """
#include <stdint.h>

static inline int32_t ones(uint64_t x) {
  x -= (x >> 1) & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + ((x >> 2) & 0x3333333333333333u);
  return (int32_t)((((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u) >> 56);
}
"""


def convolution(shape: Convolution, lay: Layout, name: str = "binary_conv") -> str:
    """Return the source of a convolution of packed inputs; `penjing.kernels.binary.functions` lists its pointers."""
    (oh, ow), (sh, sw), (dh, dw), (kh, kw) = shape.outputs, shape.stride, shape.dilation, shape.kernel
    h, w = shape.height + 2 * shape.pad[0], shape.width + 2 * shape.pad[1]
    word = f"uint{lay.word}_t"
    return f"""{POPCOUNT}
void {name}(const {word} *in, const {word} *weights, const int32_t *table, const int32_t *rows, const int32_t *columns,
            const float *scale, const float *shift, float *out, int32_t begin, int32_t end) {{
  for (int32_t row = begin; row < end; row++) {{
    int32_t y = row % {oh};
    const {word} *image = in + (int64_t)(row / {oh}) * {h * w * lay.words};
    for (int32_t x = 0; x < {ow}; x++) {{
      const int32_t *base = table + (int64_t)(rows[y] + columns[x]) * {lay.filters};
      float *to = out + ((int64_t)row * {ow} + x) * {lay.filters};
      for (int32_t o = 0; o < {lay.filters}; o++) {{
        const {word} *b = weights + (int64_t)o * {kh * kw * lay.words};
        int32_t count = 0;
        for (int32_t i = 0; i < {kh}; i++)
          for (int32_t j = 0; j < {kw}; j++) {{
            const {word} *a = image + ((int64_t)(y * {sh} + i * {dh}) * {w} + x * {sw} + j * {dw}) * {lay.words};
            for (int32_t c = 0; c < {lay.words}; c++) count += ones(({word})(a[c] ^ *b++));
          }}
        to[o] = (float)(base[o] - 2 * count) * scale[o] + shift[o];
      }}
    }}
  }}
}}
"""


def pack(shape: Convolution, lay: Layout, name: str = "binary_pack") -> str:
    """Return the source that packs rows of an input into the inside of a padded buffer of bits."""
    h, w = shape.height + 2 * shape.pad[0], shape.width + 2 * shape.pad[1]
    return f"""
#include <stdint.h>

void {name}(const float *in, const float *threshold, uint8_t *bits, int32_t begin, int32_t end) {{
  for (int32_t row = begin; row < end; row++)
    for (int32_t x = 0; x < {shape.width}; x++) {{
      const float *from = in + ((int64_t)row * {shape.width} + x) * {shape.channels};
      uint8_t *to = bits + (((int64_t)(row / {shape.height}) * {h} + row % {shape.height} + {shape.pad[0]}) * {w}
                            + x + {shape.pad[1]}) * {lay.bytes};
      for (int32_t b = 0; b < {lay.bytes}; b++) {{
        uint8_t word = 0;
        for (int32_t i = 0, c = b; c < {shape.channels}; i++, c += {lay.bytes})
          word |= (uint8_t)((from[c] >= threshold[c]) << i);
        to[b] = word;
      }}
    }}
}}
"""


def packed_product(shape: Product, name: str = "packed_product") -> str:
    """Return the source of a product of packed weights; `packed_programs.product` lists its pointers."""
    words, groups = shape.group // shape.per_word, shape.inputs // shape.group
    return f"""
#include <stdint.h>

void {name}(const float *x, const float *sums, const int32_t *weights, const float *scales, float *y, int32_t begin,
            int32_t end) {{
  for (int32_t o = begin; o < end; o++) {{
    const int32_t *w = weights + (int64_t)o * {groups * words};
    float total = 0;
    for (int32_t g = 0; g < {groups}; g++) {{
      const float *from = x + (int64_t)g * {shape.group};
      float part = sums[g];
      for (int32_t n = 0; n < {words}; n++, w++) {{
        uint32_t word = (uint32_t)*w;
        for (int32_t k = 0; k < {shape.per_word - 1}; k++)
          part += *from++ * (float)(word & ((uint32_t){2**shape.bits - 1} << ({shape.bits} * k)));
        part += *from++ * (float)(word >> {32 - shape.bits});
      }}
      total += part * scales[(int64_t)o * {groups} + g];
    }}
    y[o] = total;
  }}
}}
"""


LAYERS = """
#include <stdint.h>

static inline void convolve(const float *in, const float *weights, const float *scale, const float *shift, float *out,
                            int h, int w, int c, int oh, int ow, int f, int kh, int kw, int sh, int sw, int ph, int pw,
                            int dh, int dw) {
  for (int y = 0; y < oh; y++)
    for (int x = 0; x < ow; x++, out += f) {
      for (int o = 0; o < f; o++) out[o] = 0;
      for (int i = 0; i < kh; i++)
        for (int j = 0; j < kw; j++) {
          int row = y * sh - ph + i * dh, column = x * sw - pw + j * dw;
          if (row < 0 || row >= h || column < 0 || column >= w) continue;
          const float *from = in + ((int64_t)row * w + column) * c, *by = weights + ((int64_t)i * kw + j) * c * f;
          for (int k = 0; k < c; k++)
            for (int o = 0; o < f; o++) out[o] += from[k] * by[(int64_t)k * f + o];
        }
      for (int o = 0; o < f; o++) out[o] = out[o] * scale[o] + shift[o];
    }
}

static inline void maximum(const float *in, float *out, int h, int w, int c, int oh, int ow, int kh, int kw, int sh,
                           int sw, int ph, int pw, int dh, int dw) {
  for (int y = 0; y < oh; y++)
    for (int x = 0; x < ow; x++, out += c) {
      int first = 1;
      for (int i = 0; i < kh; i++)
        for (int j = 0; j < kw; j++) {
          int row = y * sh - ph + i * dh, column = x * sw - pw + j * dw;
          if (row < 0 || row >= h || column < 0 || column >= w) continue;
          const float *from = in + ((int64_t)row * w + column) * c;
          for (int k = 0; k < c; k++) out[k] = first || from[k] > out[k] || from[k] != from[k] ? from[k] : out[k];
          first = 0;
        }
    }
}

static inline void add(const float *a, const float *b, float *out, int n) {
  for (int i = 0; i < n; i++) out[i] = a[i] + b[i];
}

static inline void relu(const float *in, float *out, int n) {
  for (int i = 0; i < n; i++) out[i] = in[i] <= 0 ? 0 : in[i];
}

static inline void average(const float *in, float *out, int pixels, int c) {
  for (int k = 0; k < c; k++) out[k] = 0;
  for (int p = 0; p < pixels; p++)
    for (int k = 0; k < c; k++) out[k] += in[(int64_t)p * c + k];
  for (int k = 0; k < c; k++) out[k] /= (float)pixels;
}

static inline void drop(const float *in, float *out, int pixels, int from, int to) {
  for (int p = 0; p < pixels; p++)
    for (int k = 0; k < to; k++) out[(int64_t)p * to + k] = in[(int64_t)p * from + k];
}
"""
"""The layers around the binary ones, NHWC; calls have constant sizes, for which the compiler unrolls. NaN stays NaN."""

__all__ = ["LAYERS", "POPCOUNT", "convolution", "pack", "packed_product"]
