"""The kernels in plain C99, for processors that LLVM does not know or that have no vectors.

Functions have the names, pointers and layouts of the kernels that TVM generates, with one lane.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penjing.kernels.binary import Convolution, Layout
    from penjing.kernels.packed_weights import Product
    from penjing.kernels.ternary import Layout as TernaryLayout

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


def ternary(shape: Convolution, lay: TernaryLayout, name: str = "ternary_conv") -> str:
    """Return the source of a convolution of ternary weights; `penjing.kernels.ternary.function` lists its pointers."""
    (oh, ow), (sh, sw), (dh, dw), (kh, kw) = shape.outputs, shape.stride, shape.dilation, shape.kernel
    h, w = shape.height + 2 * shape.pad[0], shape.width + 2 * shape.pad[1]
    return f"""
#include <stdint.h>

void {name}(const float *in, const int32_t *weights, const float *scale, const float *shift, float *out, int32_t begin,
            int32_t end) {{
  for (int32_t row = begin; row < end; row++)
    for (int32_t x = 0; x < {ow}; x++)
      for (int32_t o = 0; o < {lay.filters}; o++) {{
        const int32_t *b = weights + (int64_t)o * {kh * kw * lay.words};
        float sum = 0;
        for (int32_t i = 0; i < {kh}; i++)
          for (int32_t j = 0; j < {kw}; j++) {{
            int64_t y = row / {oh} * {h} + row % {oh} * {sh} + i * {dh};
            const float *a = in + (y * {w} + x * {sw} + j * {dw}) * {lay.channels};
            for (int32_t c = 0; c < {lay.words}; c++, b++)
              for (int32_t k = 0; k < 16; k++) {{
                int32_t bits = (int32_t)((uint32_t)*b >> (2 * k) & 3);
                sum += *a++ * (float)(bits == 3 ? -1 : bits);
              }}
          }}
        out[((int64_t)row * {ow} + x) * {lay.filters} + o] = sum * scale[o] + shift[o];
      }}
}}
"""


HEAD = """
#include <stdint.h>

#ifdef __GNUC__
#define ONCE static __attribute__((noinline, noclone))
#define SHORT __attribute__((optimize(\"Os\")))
#define RARE static __attribute__((noinline, noclone, cold))
#define SHOWN __attribute__((visibility("default")))
#else
#define ONCE static
#define SHORT
#define RARE static
#define SHOWN
#endif
"""
"""Of a library: `ONCE` marks functions that are not copied into those that call them, for the library's size, and
`RARE` those that are short rather than fast."""


def included(data: Path) -> str:
    """Return the source that makes the bytes of a file ``penjing_data``, at an address that is a multiple of 64."""
    name = str(data).replace("\\", "\\\\").replace('"', '\\"')
    code = f'.section .rodata\n.balign 64\npenjing_data: .incbin "{name}"\n.previous\n'
    quoted = code.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'extern const char penjing_data[] __attribute__((visibility("hidden")));\n__asm__("{quoted}");\n'


LAYERS = """
#define BLOCK 16  /* numbers that are computed together: loops of a known length become vectors in little code */
#define EACH(i, n, ...) \\
  for (int at_##i = 0; at_##i < (n); at_##i += BLOCK) { \\
    if (at_##i + BLOCK <= (n)) for (int i = at_##i; i < at_##i + BLOCK; i++) { __VA_ARGS__; } \\
    else for (int i = at_##i; i < (n); i++) { __VA_ARGS__; } \\
  }

/* As many numbers in registers: a compiler that finds vectors in loops does so in some programs and not in others. */
typedef float block __attribute__((vector_size(4 * BLOCK), aligned(4), may_alias));
typedef int32_t bits __attribute__((vector_size(4 * BLOCK)));

ONCE void convolve(const float *in, const float *weights, const float *scale, const float *shift, float *out,
                   int h, int w, int c, int ow, int f, int kh, int kw, int sh, int sw, int ph, int pw, int dh, int dw,
                   int begin, int end) {
  out += (int64_t)begin * ow * f;
  for (int y = begin; y < end; y++)
    for (int x = 0; x < ow; x++, out += f)
      for (int o = 0; o < f; o += BLOCK) {
        block sum = {0};
        int some = f - o < BLOCK ? f - o : BLOCK;  /* behind the last filter something else lies, and is not used */
        for (int i = 0; i < kh; i++)
          for (int j = 0; j < kw; j++) {
            int row = y * sh - ph + i * dh, column = x * sw - pw + j * dw;
            if (row < 0 || row >= h || column < 0 || column >= w) continue;
            const float *from = in + ((int64_t)row * w + column) * c;
            const float *by = weights + ((int64_t)i * kw + j) * c * f + o;
            for (int k = 0; k < c; k++, by += f) sum += from[k] * *(const block *)by;
          }
        sum = sum * *(const block *)(scale + o) + *(const block *)(shift + o);
        if (some == BLOCK) *(block *)(out + o) = sum;
        else for (int l = 0; l < some; l++) out[o + l] = sum[l];
      }
}

static void convolve_rows(void **a, int32_t begin, int32_t end) {
  const int32_t *s = a[5];
  convolve(a[0], a[1], a[2], a[3], a[4], s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11],
           s[12], begin, end);
}

ONCE void maximum(const float *in, float *out, int h, int w, int c, int oh, int ow, int kh, int kw, int sh, int sw,
                  int ph, int pw, int dh, int dw) {
  for (int y = 0; y < oh; y++)
    for (int x = 0; x < ow; x++, out += c) {
      int first = 1;
      for (int i = 0; i < kh; i++)
        for (int j = 0; j < kw; j++) {
          int row = y * sh - ph + i * dh, column = x * sw - pw + j * dw;
          if (row < 0 || row >= h || column < 0 || column >= w) continue;
          const float *from = in + ((int64_t)row * w + column) * c;
          EACH(k, c, out[k] = first || from[k] > out[k] || from[k] != from[k] ? from[k] : out[k])
          first = 0;
        }
    }
}

/* Of these, n is a multiple of BLOCK: what lies behind values is theirs. */
#define AT(pointer, i) (*(block *)((pointer) + (i)))

static inline block not_negative(block x) {  /* NaN stays NaN */
  return (block)((bits)x & ~(bits)(x <= 0));
}

ONCE void add(const float *a, const float *b, float *out, int n) {
  for (int i = 0; i < n; i += BLOCK) AT(out, i) = AT(a, i) + AT(b, i);
}

ONCE void relu(const float *in, float *out, int n) {
  for (int i = 0; i < n; i += BLOCK) AT(out, i) = not_negative(AT(in, i));
}

ONCE void add_relu(const float *a, const float *b, float *out, int n) {
  for (int i = 0; i < n; i += BLOCK) AT(out, i) = not_negative(AT(a, i) + AT(b, i));
}

ONCE void sign(const float *in, const float *threshold, float *out, int pixels, int c) {
  for (int p = 0; p < pixels; p++, in += c, out += c) EACH(k, c, out[k] = in[k] >= threshold[k] ? 1 : -1)
}

RARE void average(const float *in, float *out, int pixels, int c) {
  for (int k = 0; k < c; k++) {
    float sum = 0;
    for (int p = 0; p < pixels; p++) sum += in[(int64_t)p * c + k];
    out[k] = sum / (float)pixels;
  }
}

ONCE void drop(const float *in, float *out, int pixels, int from, int to) {
  for (int p = 0; p < pixels; p++)
    for (int k = 0; k < to; k++) out[(int64_t)p * to + k] = in[(int64_t)p * from + k];
}

/* An image of c channels in the middle of one with a border and more channels, which are 0 */
ONCE void frame(const float *in, float *out, int h, int w, int c, int ph, int pw, int channels) {
  for (int y = 0; y < h; y++)
    for (int x = 0; x < w; x++)
      for (int k = 0; k < c; k++)
        out[((int64_t)(y + ph) * (w + 2 * pw) + x + pw) * channels + k] = in[((int64_t)y * w + x) * c + k];
}

/* (planes, size) to (size, planes) */
RARE void to_pixels(const float *in, float *out, int planes, int size) {
  for (int i = 0; i < size; i++)
    for (int k = 0; k < planes; k++) *out++ = in[(int64_t)k * size + i];
}

/* 16 bits to 32: sign, exponent, fraction; a number of the smallest exponent is a multiple of 2^-24 */
RARE void widen(const uint16_t *in, float *out, int n) {
  for (int i = 0; i < n; i++) {
    uint32_t rest = in[i] & 0x7fffu;
    union { uint32_t bits; float value; } number;
    if (rest < 0x400u) number.value = (float)rest / 16777216.0f;
    else number.bits = (rest << 13) + 0x38000000u;
    number.bits |= (uint32_t)(in[i] & 0x8000u) << 16;
    out[i] = number.value;
  }
}

RARE void convert(const int8_t *in, float *out, int n) {
  for (int i = 0; i < n; i++) out[i] = (float)in[i];
}

/* Which taps of an axis lie inside, for every place of the output: numbers of distinct sets; returns how many. */
RARE int inside(int n, int size, int taps, int stride, int pad, int apart, uint64_t *sets, int32_t *of, int times) {
  int count = 0;
  for (int y = 0; y < n; y++) {
    uint64_t set = 0;
    for (int i = 0; i < taps; i++) {
      int at = y * stride - pad + i * apart;
      if (at >= 0 && at < size) set |= (uint64_t)1 << i;
    }
    int j = 0;
    while (j < count && sets[j] != set) j++;
    if (j == count) sets[count++] = set;
    of[y] = j * times;
  }
  return count;
}

/* What a binary layer adds to its counts: of taps on padding, the 1s of the weights are taken back. */
RARE void borders(const uint8_t *weights, const int32_t *s, int32_t *table, int32_t *rows, int32_t *columns) {
  uint64_t across[64], down[64];
  int right = inside(s[3], s[1], s[5], s[7], s[9], s[11], across, columns, 1);
  int below = inside(s[2], s[0], s[4], s[6], s[8], s[10], down, rows, right);
  int channels = s[12], bytes = s[13], words = s[14], filters = s[15], tiles = s[16];
  for (int r = 0; r < below; r++)
    for (int q = 0; q < right; q++)
      for (int o = 0; o < tiles * filters; o++, table++) {
        const uint8_t *tap = weights + ((int64_t)(o / filters) * s[4] * s[5] * words * filters + o % filters) * bytes;
        *table = 0;
        for (int i = 0; i < s[4]; i++)
          for (int j = 0; j < s[5]; j++)
            for (int n = 0; n < words; n++, tap += filters * bytes) {
              if ((down[r] >> i & 1) && (across[q] >> j & 1)) {
                *table += n ? 0 : channels;
                continue;
              }
              for (int b = 0; b < bytes; b++)
                for (int bit = 0; bit < 8; bit++) *table += 2 * (tap[b] >> bit & 1);
            }
      }
}
"""
"""The layers around the binary ones, NHWC, and what is computed once when a library is opened. NaN stays NaN."""

SHARED = """
#ifdef __AVX512F__
#include <immintrin.h>
#define SIGNS(in, threshold) \\
  _mm512_cmp_ps_mask(_mm512_loadu_ps(in), _mm512_loadu_ps(threshold), _CMP_GE_OQ)
#else
static inline uint16_t SIGNS(const float *in, const float *threshold) {
  uint16_t word = 0;
  for (int i = 0; i < 16; i++) word |= (uint16_t)((in[i] >= threshold[i]) << i);
  return word;
}
#endif

/* A binary layer whose words have 16 bits. Of it: weights, the number of its shape, tables; of its shape see
   `_geometry`: s[19] is the place of the packed input, s[20] the pixels of a tile, s[21] the kernel. */
ONCE SHORT void binary(int layer, const float *in, float *out, char *m, const float *numbers) {
  const int32_t *s = shapes[layers[layer][1]];
  const char *t = m + TABLES + layers[layer][2];
  int words = s[14], filters = s[15] * s[16], wide = (s[1] + 2 * s[9]) * words;
  uint16_t *bits = (uint16_t *)(m + ARENA + s[19]), *to = bits + s[8] * wide + s[9] * words;
  for (int y = 0; y < s[0]; y++, to += 2 * s[9] * words)
    for (int x = 0, k = 0; x < s[1] * words; x++, in += 16) {
      *to++ = SIGNS(in, numbers + 16 * k);
      if (++k == words) k = 0;
    }
  int64_t sizes[9] = {s[10] * wide, s[5] * words, s[4], s[7] * words, s[6] * wide, s[3], s[16], filters, s[20]};
  const uint16_t *weights = (const uint16_t *)(penjing_data + layers[layer][0]);
  const int32_t *rows = (const int32_t *)(t + s[17]), *columns = (const int32_t *)(t + s[18]);
  const float *scale = numbers + s[12];
  KERNEL(s[21])(bits, weights, (const int32_t *)t, rows, columns, scale, scale + filters, out, sizes, 0, s[2]);
}
"""
"""Binary layers of `shared_programs`, behind tables of the layers and shapes and a macro of the kernels."""

THREADS = """
static int32_t threads = 1;
SHOWN void penjing_threads(int32_t count) { threads = count; }
"""
"""Of a library whose threads share rows, behind the pool of `threads`."""


def split(name: str, pointers: str, rows: int) -> str:
    """C source that calls a kernel for its rows, shared by threads."""
    given = ", ".join(f"(void *)({pointer})" for pointer in pointers.split(", "))
    return f"  {{ void *a[] = {{{given}}}; penjing_run({name}_rows, a, {rows}, threads); }}"


__all__ = [
    "HEAD",
    "LAYERS",
    "POPCOUNT",
    "SHARED",
    "THREADS",
    "convolution",
    "included",
    "pack",
    "packed_product",
    "split",
    "ternary",
]
