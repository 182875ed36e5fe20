# mypy: disable-error-code="valid-type, misc, name-defined, untyped-decorator, no-untyped-def"
"""The binary kernels of `penjing.kernels.binary` in TVM's language: what the parser reads, with shapes filled in.

Accumulators stay in registers: a tile of pixels × vectors of filters. A word of an input pixel is compared with the
words of as many filters as a vector has lanes, and the 1s are added lane by lane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penjing.kernels.building import needs_tvm

if TYPE_CHECKING:
    from penjing.kernels.binary import Convolution, Layout


def convolution(shape: Convolution, lay: Layout) -> Any:
    """Return the program of a convolution of packed inputs; `penjing.kernels.binary.functions` lists its pointers."""
    needs_tvm()
    from tvm.script import tirx as T

    from penjing.kernels.binary import chunks

    (OH, OW), (SH, SW), (DH, DW) = shape.outputs, shape.stride, shape.dilation
    H, W = shape.height + 2 * shape.pad[0], shape.width + 2 * shape.pad[1]
    N, (KH, KW), CW = shape.batch, shape.kernel, lay.words
    P, V, L, O, F = lay.pixels, lay.vectors, lay.lanes, lay.tiles, lay.filters  # noqa: E741
    D, X = f"uint{lay.word}", -(-OW // lay.pixels)
    (RH, RW, RC), (IH, IW, IC) = chunks(shape, lay)

    @T.prim_func
    def conv(
        p_in: T.ptr(D),
        p_weights: T.ptr(D),
        p_table: T.ptr("int32"),
        p_rows: T.ptr("int32"),
        p_columns: T.ptr("int32"),
        p_scale: T.ptr("float32"),
        p_shift: T.ptr("float32"),
        p_out: T.ptr("float32"),
        begin: T.int32,
        end: T.int32,
    ):
        T.func_attr({"tirx.noalias": True})
        a = T.decl_buffer((N * H, W, CW), D, data=p_in)
        b = T.decl_buffer((O, KH, KW, CW, V, L), D, data=p_weights)
        table = T.decl_buffer((KH * KW * 16, F), "int32", data=p_table)
        rows = T.decl_buffer((OH,), "int32", data=p_rows)
        columns = T.decl_buffer((OW,), "int32", data=p_columns)
        scale = T.decl_buffer((F,), "float32", data=p_scale)
        shift = T.decl_buffer((F,), "float32", data=p_shift)
        out = T.decl_buffer((N * OH, OW, F), "float32", data=p_out)
        for row in T.serial(begin, end):
            for o in T.serial(O):
                for x in T.serial(X):
                    total = T.alloc_buffer((P, V, L), "int32", scope="local")
                    for p in T.unroll(P):
                        for v in T.unroll(V):
                            for lane in T.vectorized(L):
                                total[p, v, lane] = 0
                    for rh in T.serial(RH):
                        for rw in T.serial(RW):
                            for rc in T.serial(RC):
                                count = T.alloc_buffer((P, V, L), D, scope="local")
                                for p in T.unroll(P):
                                    for v in T.unroll(V):
                                        for lane in T.vectorized(L):
                                            count[p, v, lane] = T.cast(0, D)
                                for ih in T.serial(IH):
                                    for iw in T.serial(IW):
                                        for ic in T.serial(IC):
                                            for p in T.unroll(P):
                                                for v in T.unroll(V):
                                                    for lane in T.vectorized(L):
                                                        # The last tile of a row begins early and computes some again.
                                                        count[p, v, lane] = count[p, v, lane] + T.popcount(
                                                            a[
                                                                row // OH * H + row % OH * SH + (rh * IH + ih) * DH,
                                                                (T.min(x * P, OW - P) + p) * SW + (rw * IW + iw) * DW,
                                                                rc * IC + ic,
                                                            ]
                                                            ^ b[o, rh * IH + ih, rw * IW + iw, rc * IC + ic, v, lane]
                                                        )
                                for p in T.unroll(P):
                                    for v in T.unroll(V):
                                        for lane in T.vectorized(L):
                                            total[p, v, lane] = total[p, v, lane] + T.Cast("int32", count[p, v, lane])
                    for p in T.unroll(P):
                        for v in T.unroll(V):
                            for lane in T.vectorized(L):
                                f = T.meta_var((o * V + v) * L + lane)
                                z = T.meta_var(T.min(x * P, OW - P) + p)
                                base = T.meta_var(table[rows[row % OH] + columns[z], f])
                                out[row, z, f] = T.Cast("float32", base - 2 * total[p, v, lane]) * scale[f] + shift[f]

    return conv


def pack(shape: Convolution, lay: Layout) -> Any:
    """Return the program that packs rows of an input into the inside of a padded buffer of bits.

    Pointers: inputs (batch, height, width, channels) float32, thresholds (8·bytes,), bits (batch, padded height, padded
    width, bytes).
    """
    needs_tvm()
    from tvm.script import tirx as T

    N, H, W, C, B = shape.batch, shape.height, shape.width, shape.channels, lay.bytes
    (PH, PW), HP, WP = shape.pad, shape.height + 2 * shape.pad[0], shape.width + 2 * shape.pad[1]
    L = next(n for n in (16, 8, 4, 2, 1) if B % n == 0)
    G = B // L
    FULL = C // B  # bits of a byte that every byte has
    REST = C - FULL * B

    @T.prim_func
    def binary_pack(
        p_in: T.ptr("float32"), p_threshold: T.ptr("float32"), p_bits: T.ptr("uint8"), begin: T.int32, end: T.int32
    ):
        T.func_attr({"tirx.noalias": True})
        x = T.decl_buffer((N * H, W, C), "float32", data=p_in)
        threshold = T.decl_buffer((8 * B,), "float32", data=p_threshold)
        bits = T.decl_buffer((N * HP, WP, B), "uint8", data=p_bits)
        for row in T.serial(begin, end):
            for w in T.serial(W):
                for g in T.serial(G):
                    word = T.alloc_buffer((L,), "int32", scope="local")
                    for lane in T.vectorized(L):
                        word[lane] = 0
                    for i in T.unroll(FULL):
                        for lane in T.vectorized(L):
                            word[lane] = word[lane] | T.Select(
                                x[row, w, i * B + g * L + lane] >= threshold[i * B + g * L + lane],
                                T.shift_left(1, i),
                                0,
                            )
                    for lane in T.vectorized(L):
                        bits[row // H * HP + row % H + PH, w + PW, g * L + lane] = T.Cast("uint8", word[lane])
                for b in T.serial(REST):
                    bits[row // H * HP + row % H + PH, w + PW, b] = bits[
                        row // H * HP + row % H + PH, w + PW, b
                    ] | T.Cast(
                        "uint8",
                        T.Select(x[row, w, FULL * B + b] >= threshold[FULL * B + b], T.shift_left(1, FULL), 0),
                    )

    return binary_pack


__all__ = ["convolution", "pack"]
