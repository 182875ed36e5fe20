"""Grids whose steps are a quarter of an octave apart, and floats that lie on them.

A step is one of 128, 152, 181 and 215 times a power of two, which are within half a percent of 2^(1/4) apart. With so
few bits, a step times a whole number below 2^16 is exact in 32 bits, and what the step was follows from the floats.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

QUARTERS = np.array([128, 152, 181, 215], np.int64)
MOST = (1 << 15) - 1  # magnitude of a number on a grid
_PRECISION = 15  # bits of it
EXPONENTS = 180  # magnitude of a power of two, at most


def nearest_step(steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The steps of the grids next to these positive numbers, in any shape."""
    return step_of(np.round(4 * np.log2(steps)).astype(np.int64) - 28)


def step_of(places: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The steps, from their place in quarters of an octave; place 0 is 128."""
    return np.ldexp(QUARTERS[places % 4].astype(np.float64), places // 4)


def recognized(
    values: npt.NDArray[np.float32], columns: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """Places of the rows' steps, (rows,), and the numbers on these grids, (n,); None where a row lies on none.

    Args:
        values: (n,) in rows of `columns`; the last may be shorter.
        columns: At least 1.
    """
    if not np.isfinite(values).all() or (np.signbit(values) & (values == 0)).any():
        return None
    rows = np.zeros((-(-len(values) // columns), columns))
    rows.reshape(-1)[: len(values)] = values
    places, numbers = np.zeros(len(rows), np.int64), np.zeros(rows.shape, np.int64)
    largest = np.full(len(rows), MOST + 1)
    for quarter, factor in enumerate(QUARTERS.tolist()):
        mantissa, exponent = (np.asarray(part) for part in np.frexp(rows / factor))
        whole = np.round(np.ldexp(mantissa, _PRECISION)).astype(np.int64)
        exponent = exponent.astype(np.int64) - _PRECISION
        fits = (np.ldexp(whole.astype(np.float64), exponent) * factor == rows).all(1)
        lowest = exponent + np.log2(np.maximum(whole & -whole, 1)).astype(np.int64)
        base = np.where(whole != 0, lowest, EXPONENTS + 1).min(1)
        base[base > EXPONENTS] = 0  # of a row of zeros
        far = np.where(whole != 0, exponent - base[:, None], 0)
        fits &= (far.max(1) <= _PRECISION) & (np.abs(base) <= EXPONENTS)
        whole = np.where(far >= 0, whole << np.clip(far, 0, _PRECISION), whole >> np.clip(-far, 0, _PRECISION))
        # Of several grids the coarsest.
        fits &= np.abs(whole).max(1) < largest
        largest[fits] = np.abs(whole[fits]).max(1)
        places[fits], numbers[fits] = 4 * base[fits] + quarter, whole[fits]
    return (places, numbers.reshape(-1)[: len(values)]) if (largest <= MOST).all() else None


def floats(places: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64], columns: int) -> npt.NDArray[np.float32]:
    """The floats that were `recognized`, (n,)."""
    steps = np.repeat(step_of(places), columns)[: len(numbers)]
    with np.errstate(over="ignore"):
        return (steps * numbers).astype(np.float32)
