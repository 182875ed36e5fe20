"""The rank of a matrix seen through noise: empirical variational Bayesian matrix factorization, in closed form.

Nakajima, Sugiyama, Babacan and Tomioka, "Global Analytic Solution of Fully-Observed Variational Bayesian Matrix
Factorization", JMLR 14, 2013: theorems 2 to 4. The noise variance is the one that minimizes the free energy, and a
singular value counts where the model with it explains the matrix better than the model without it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq, minimize_scalar

Floats = npt.NDArray[np.float64]


def rank(matrix: npt.ArrayLike) -> int:
    """How many singular values of a matrix stand out of its noise; 0 where none does.

    Args:
        matrix: (rows, columns), finite.
    """
    values = np.asarray(matrix, dtype=np.float64)
    short, long = sorted(values.shape)
    if not short or not values.any():
        return 0
    singular = np.linalg.svd(values, compute_uv=False)
    squares = np.maximum(singular**2, 1e-12 * singular[0] ** 2)
    return int((squares > threshold(short, long) * long * noise_variance(squares, long)).sum())


def threshold(short: int, long: int) -> float:
    """The smallest γ²/(long·σ²) of a singular value γ that counts, at noise variance σ²."""
    alpha = short / long

    def balance(tau: float) -> float:  # 0 where a component explains as much as it costs
        return math.log1p(tau) / tau - 0.5 + math.log1p(tau / alpha) * alpha / tau - 0.5

    tau = brentq(balance, 1e-9, 10)
    return float((1 + tau) * (1 + alpha / tau))


def noise_variance(squares: Floats, long: int) -> float:
    """The noise variance that minimizes the free energy.

    Args:
        squares: Squared singular values of a matrix with as many rows, descending.
        long: The columns of the matrix, at least as many.
    """
    short = len(squares)
    limit = threshold(short, long)
    upper = squares.sum() / (short * long)
    most = max(1, min(math.ceil(short / (1 + short / long)) - 1, short - 1))  # of the values that can count
    rest = squares[most:] if short > 1 else squares
    lower = max(float(rest[0]) / (long * limit), float(rest.mean()) / long, 1e-12 * upper)
    if lower >= upper:
        return float(upper)
    # In the logarithm, and from several starts: the energy is smooth between two singular values alone.
    ends = np.geomspace(lower, upper, 65)
    energies = [free_energy(squares, long, end) for end in ends]
    best = int(np.argmin(energies))
    low, high = math.log(ends[max(0, best - 1)]), math.log(ends[min(64, best + 1)])
    nearby = minimize_scalar(
        lambda log: free_energy(squares, long, math.exp(log)), bounds=(low, high), method="bounded"
    )
    return min((float(energies[best]), float(ends[best])), (float(nearby.fun), math.exp(nearby.x)))[1]


def free_energy(squares: Floats, long: int, variance: float) -> float:
    """Free energy of the solution at a noise variance, without constants, per column."""
    alpha = len(squares) / long
    x = squares / (long * variance)
    limit = threshold(len(squares), long)
    counted, rest = x[x > limit], x[x <= limit]
    tau = 0.5 * (counted - (1 + alpha) + np.sqrt((counted - (1 + alpha)) ** 2 - 4 * alpha))
    energy = (rest - np.log(rest)).sum() + (counted - tau).sum()
    return float(energy + np.log((tau + 1) / counted).sum() + alpha * np.log(tau / alpha + 1).sum())


__all__ = ["free_energy", "noise_variance", "rank", "threshold"]
