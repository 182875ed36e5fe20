"""Kernels below 8 bits, generated for one shape and one instruction set: binary layers and packed weights.

Needs `tvm` and a C compiler where kernels are generated, and neither where they run: a kernel is a shared library that
ctypes loads. `penjing.kernels.binary` multiplies signs, `penjing.kernels.packed_weights` weights of 4 or 2 bits,
`penjing.kernels.c_source` writes the same kernels in C99 for processors that have neither.
"""
