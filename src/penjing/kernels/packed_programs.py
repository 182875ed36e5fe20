# mypy: disable-error-code="valid-type, misc, name-defined, untyped-decorator, no-untyped-def"
"""The product of `penjing.kernels.packed_weights` in TVM's language: what the parser reads, with shapes filled in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penjing.kernels.building import needs_tvm

if TYPE_CHECKING:
    from penjing.kernels.packed_weights import Product, Tiles


def product(shape: Product, lay: Tiles) -> Any:
    """Return the program of a product; its rows are tiles of outputs.

    Pointers: x·2^(−bits·k) (inputs,) float32, −2^(bits−1)·Σx of every group (groups,) float32, weights (tiles, words,
    vectors, lanes) int32, scales (tiles, groups, vectors, lanes) float32, y (tiles, vectors, lanes) float32.
    """
    needs_tvm()
    from tvm.script import tirx as T

    O, V, L, K = lay.tiles, lay.vectors, lay.lanes, shape.per_word  # noqa: E741
    G, N = shape.inputs // shape.group, shape.group // shape.per_word
    MASK, BITS = 2**shape.bits - 1, shape.bits

    @T.prim_func
    def packed_product(
        p_x: T.ptr("float32"),
        p_sums: T.ptr("float32"),
        p_weights: T.ptr("int32"),
        p_scales: T.ptr("float32"),
        p_y: T.ptr("float32"),
        begin: T.int32,
        end: T.int32,
    ):
        T.func_attr({"tirx.noalias": True})
        x = T.decl_buffer((G, N, K), "float32", data=p_x)
        sums = T.decl_buffer((G,), "float32", data=p_sums)
        weights = T.decl_buffer((O, G, N, V, L), "int32", data=p_weights)
        scales = T.decl_buffer((O, G, V, L), "float32", data=p_scales)
        y = T.decl_buffer((O, V, L), "float32", data=p_y)
        for o in T.serial(begin, end):
            total = T.alloc_buffer((V, L), "float32", scope="local")
            for v in T.unroll(V):
                for lane in T.vectorized(L):
                    total[v, lane] = T.float32(0)
            for g in T.serial(G):
                part = T.alloc_buffer((V, L), "float32", scope="local")
                for v in T.unroll(V):
                    for lane in T.vectorized(L):
                        part[v, lane] = sums[g]
                for n in T.serial(N):
                    for k in T.unroll(K - 1):
                        for v in T.unroll(V):
                            for lane in T.vectorized(L):
                                part[v, lane] = part[v, lane] + x[g, n, k] * T.Cast(
                                    "float32", T.bitwise_and(weights[o, g, n, v, lane], T.shift_left(MASK, BITS * k))
                                )
                    for v in T.unroll(V):
                        for lane in T.vectorized(L):
                            part[v, lane] = part[v, lane] + x[g, n, K - 1] * T.Cast(
                                "float32",
                                T.bitwise_and(T.shift_right(weights[o, g, n, v, lane], 32 - BITS), MASK),
                            )
                for v in T.unroll(V):
                    for lane in T.vectorized(L):
                        total[v, lane] = total[v, lane] + part[v, lane] * scales[o, g, v, lane]
            for v in T.unroll(V):
                for lane in T.vectorized(L):
                    y[o, v, lane] = total[v, lane]

    return packed_product


__all__ = ["product"]
