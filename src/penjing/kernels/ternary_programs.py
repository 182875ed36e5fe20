# mypy: disable-error-code="valid-type, misc, name-defined, untyped-decorator, no-untyped-def"
"""The kernel of `penjing.kernels.ternary` in TVM's language: what the parser reads, with shapes filled in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penjing.kernels.building import needs_tvm

if TYPE_CHECKING:
    from penjing.kernels.binary import Convolution
    from penjing.kernels.ternary import Layout


def convolution(shape: Convolution, lay: Layout) -> Any:
    """Return the program of a convolution; `penjing.kernels.ternary.function` lists its pointers."""
    needs_tvm()
    from tvm.script import tirx as T

    from penjing.kernels.ternary import PER_WORD

    (OH, OW), (SH, SW), (DH, DW) = shape.outputs, shape.stride, shape.dilation
    H, W = shape.height + 2 * shape.pad[0], shape.width + 2 * shape.pad[1]
    N, (KH, KW), CW, C = shape.batch, shape.kernel, lay.words, lay.channels
    P, V, L, O, F = lay.pixels, lay.vectors, lay.lanes, lay.tiles, lay.filters  # noqa: E741
    X, K = -(-OW // lay.pixels), min(PER_WORD, shape.channels)

    @T.prim_func
    def conv(
        p_in: T.ptr("float32"),
        p_weights: T.ptr("int32"),
        p_scale: T.ptr("float32"),
        p_shift: T.ptr("float32"),
        p_out: T.ptr("float32"),
        begin: T.int32,
        end: T.int32,
    ):
        T.func_attr({"tirx.noalias": True})
        a = T.decl_buffer((N * H, W, C), "float32", data=p_in)
        b = T.decl_buffer((O, KH, KW, CW, V, L), "int32", data=p_weights)
        scale = T.decl_buffer((F,), "float32", data=p_scale)
        shift = T.decl_buffer((F,), "float32", data=p_shift)
        out = T.decl_buffer((N * OH, OW, F), "float32", data=p_out)
        for row in T.serial(begin, end):
            for o in T.serial(O):
                for x in T.serial(X):
                    total = T.alloc_buffer((P, V, L), "float32", scope="local")
                    for p in T.unroll(P):
                        for v in T.unroll(V):
                            for lane in T.vectorized(L):
                                total[p, v, lane] = T.float32(0)
                    for kh in T.serial(KH):
                        for kw in T.serial(KW):
                            for cw in T.serial(CW):
                                for k in T.unroll(K):
                                    weight = T.alloc_buffer((V, L), "float32", scope="local")
                                    for v in T.unroll(V):
                                        for lane in T.vectorized(L):
                                            weight[v, lane] = T.Cast(
                                                "float32",
                                                T.shift_right(T.shift_left(b[o, kh, kw, cw, v, lane], 30 - 2 * k), 30),
                                            )
                                    for p in T.unroll(P):
                                        for v in T.unroll(V):
                                            for lane in T.vectorized(L):
                                                # The last tile of a row begins early and computes some again.
                                                total[p, v, lane] = (
                                                    total[p, v, lane]
                                                    + a[
                                                        row // OH * H + row % OH * SH + kh * DH,
                                                        (T.min(x * P, OW - P) + p) * SW + kw * DW,
                                                        cw * PER_WORD + k,
                                                    ]
                                                    * weight[v, lane]
                                                )
                    for p in T.unroll(P):
                        for v in T.unroll(V):
                            for lane in T.vectorized(L):
                                f = T.meta_var((o * V + v) * L + lane)
                                out[row, T.min(x * P, OW - P) + p, f] = total[p, v, lane] * scale[f] + shift[f]

    return conv


__all__ = ["convolution"]
