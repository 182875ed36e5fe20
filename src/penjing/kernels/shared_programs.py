# mypy: disable-error-code="valid-type, misc, name-defined, untyped-decorator, no-untyped-def"
"""A binary kernel that convolutions of many sizes share: it reads their geometry from memory.

A library of small layers is mostly code if every shape has a kernel of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penjing.kernels.building import needs_tvm

if TYPE_CHECKING:
    from penjing.kernels.binary import Layout

SIZES = 9
"""Numbers of a geometry: words from a row of the window to the next one, words of a row of the window, its rows, words
from an output's window to the next one's, and to that of the row below, pixels of a row of the output, tiles of
filters, filters, pixels of a tile."""


def convolution(lay: Layout) -> Any:
    """Return the program of convolutions of one sample, of any size, whose words have 16 bits.

    Its pointers are those of `penjing.kernels.binary.functions`, and the geometry behind them.
    """
    needs_tvm()
    from tvm.script import tirx as T

    P, V, L = lay.pixels, lay.vectors, lay.lanes
    MOST = 2**40  # longer than any buffer: places in it are computed here

    @T.prim_func
    def conv(
        p_in: T.ptr("uint16"),
        p_weights: T.ptr("uint16"),
        p_table: T.ptr("int32"),
        p_rows: T.ptr("int32"),
        p_columns: T.ptr("int32"),
        p_scale: T.ptr("float32"),
        p_shift: T.ptr("float32"),
        p_out: T.ptr("float32"),
        p_sizes: T.ptr("int64"),
        begin: T.int32,
        end: T.int32,
    ):
        T.func_attr({"tirx.noalias": True})
        a = T.decl_buffer((MOST,), "uint16", data=p_in)
        b = T.decl_buffer((MOST,), "uint16", data=p_weights)
        table = T.decl_buffer((MOST,), "int32", data=p_table)
        rows = T.decl_buffer((MOST,), "int32", data=p_rows)
        columns = T.decl_buffer((MOST,), "int32", data=p_columns)
        scale = T.decl_buffer((MOST,), "float32", data=p_scale)
        shift = T.decl_buffer((MOST,), "float32", data=p_shift)
        out = T.decl_buffer((MOST,), "float32", data=p_out)
        s = T.decl_buffer((SIZES,), "int64", data=p_sizes)
        for row in T.serial(begin, end):
            for x in T.serial((s[5] + (P - 1)) // P):
                for o in T.serial(s[6]):
                    count = T.alloc_buffer((P, V, L), "uint16", scope="local")
                    total = T.alloc_buffer((P, V, L), "uint16", scope="local")
                    for p in T.unroll(P):
                        for v in T.unroll(V):
                            for lane in T.vectorized(L):
                                count[p, v, lane] = T.cast(0, "uint16")
                    for kh in T.serial(s[2]):
                        for k in T.serial(s[1]):
                            for p in T.unroll(P):
                                for v in T.unroll(V):
                                    for lane in T.vectorized(L):
                                        # The last tile of a row begins early and computes some again.
                                        z = T.meta_var(T.min(x * P, s[5] - P))
                                        count[p, v, lane] = count[p, v, lane] + T.popcount(
                                            a[T.Cast("int64", row) * s[4] + kh * s[0] + z * s[3] + s[3] * p + k]
                                            ^ b[(((o * s[2] + kh) * s[1] + k) * V + v) * L + lane]
                                        )
                    for p in T.unroll(P):
                        for v in T.unroll(V):
                            for lane in T.vectorized(L):
                                total[p, v, lane] = count[p, v, lane]
                    # A loop of unknown length stays a loop.
                    for p in T.serial(s[8]):
                        for v in T.unroll(V):
                            for lane in T.vectorized(L):
                                f = T.meta_var((o * V + v) * L + lane)
                                z = T.meta_var(T.min(x * P, s[5] - P) + p)
                                base = T.meta_var(table[T.Cast("int64", rows[row] + columns[z]) * s[7] + f])
                                out[(T.Cast("int64", row) * s[5] + z) * s[7] + f] = (
                                    T.Cast("float32", base - 2 * T.Cast("int32", total[p, v, lane])) * scale[f]
                                    + shift[f]
                                )

    return conv


__all__ = ["SIZES", "convolution"]
