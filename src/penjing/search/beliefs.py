"""What a choice is believed to give before it is tried: figures and their uncertainty, learned from what was measured.

Every figure is a power law of what is kept, relative to the same artifact of the unchanged network, so its logarithm is
linear; the coefficients have a prior and are updated by Bayesian linear regression (Bishop, "Pattern Recognition and
Machine Learning", 2006, section 3.3). A choice is worth its expected improvement of the objective over the best that
meets the goal (Mockus et al., 1978), times the probability that it keeps every limit (Schonlau, Welch & Jones, 1998).

The priors are what pruning and quantization usually do; a handful of trials outweighs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from penjing.search.choice import Choice

NORMAL = NormalDist()
TRAINED_EPOCHS = 2.0  # the length of a training that the prior of drops speaks of
FLOOR = 3e-4  # a drop below this share of the metric counts as this


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One artifact that was measured.

    Attributes:
        choice: That it came from; for one in floating point without its integers.
        artifact: Runtime and precision: "openvino-int8".
        figures: By name, in their own units. `drop` is relative to the metric of the network that drops are against.
    """

    choice: Choice
    artifact: str
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Believed:
    """A figure's logarithm: normally distributed."""

    mean: float
    sd: float

    @property
    def value(self) -> float:
        """The median."""
        return math.exp(self.mean)

    def below(self, limit: float) -> float:
        """The probability that the figure is at most `limit`."""
        return NORMAL.cdf((math.log(limit) - self.mean) / self.sd) if limit > 0 else 0.0

    def improvement(self, best: float) -> float:
        """How far it is expected to lie below `best`, as a logarithm, counted as 0 where it lies above."""
        z = (math.log(best) - self.mean) / self.sd
        return self.sd * (z * NORMAL.cdf(z) + NORMAL.pdf(z))


@dataclass(frozen=True)
class _Law:
    """Prior means and standard deviations of the coefficients, and the noise of an observation, in logarithms."""

    means: tuple[float, ...]
    sds: tuple[float, ...]
    noise: float


def _cost(power: float, few_bits: float = 0.0) -> _Law:
    """Of a figure that grows with that power of the multiply-accumulates that are kept."""
    return _Law((0.0, power, 0.7 * power, -0.05 * power, few_bits), (0.02, 0.25, 0.35, 0.05, 0.15), 0.04)


_COSTS = {
    "latency_ms": _cost(0.7),
    "throughput_per_s": _cost(-0.7),
    "size_bytes": _cost(0.95),
    "packed_bytes": _cost(0.95, -0.7),
    "peak_memory_bytes": _cost(0.15),
    "load_ms": _cost(0.2),
    "parameters": _cost(0.95),
    "macs": _cost(1.0),
    "energy_mj": _cost(0.8),
}
# intercept, channels, low rank, blocks, length of the training, structure without training, floats, corrected,
# trained, few bits by rounding, few bits by training
_DROP = _Law(
    (math.log(0.002), 1.4, 1.4, 0.33, -0.5, 4.0, -1.5, 0.5, -0.2, 2.5, 0.7),
    (1.0, 0.5, 0.7, 0.2, 0.3, 1.5, 1.0, 0.5, 0.4, 1.0, 0.5),
    0.35,
)


class Beliefs:
    """Predictions from a prior and from observations.

    Args:
        observations: What was measured so far, the unchanged network in every runtime and precision among it.
    """

    def __init__(self, observations: Sequence[Observation]) -> None:
        self.observations = observations
        unchanged = [o for o in observations if not o.choice.structural and not o.choice.epochs]
        self.base = {o.artifact: o.figures for o in unchanged if o.choice.weight_bits == 8}
        self._fits: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def artifacts(self) -> tuple[str, ...]:
        """Runtimes and precisions of which the unchanged network's figures are known."""
        return tuple(self.base)

    def imagined(self, choice: Choice) -> list[Observation]:
        """What a choice would give if every figure were as expected."""
        rows = []
        for artifact in self.base:
            names = ("drop", *_COSTS)
            figures = {name: b.value for name in names if (b := self.figure(name, choice, artifact)) is not None}
            rows.append(Observation(choice=choice, artifact=artifact, figures=figures))
        return rows

    def figure(self, name: str, choice: Choice, artifact: str) -> Believed | None:
        """What a figure of an artifact will be; None where nothing tells."""
        if name == "drop":
            return self._predicted("drop", _DROP, _drop_features(choice), 0.0)
        base = self.base.get(artifact, {}).get(name)
        if name not in _COSTS or not base or base <= 0:
            return None
        return self._predicted(name, _COSTS[name], _cost_features(choice), math.log(base))

    def _predicted(self, name: str, law: _Law, features: np.ndarray, offset: float) -> Believed:
        if name not in self._fits:
            self._fits[name] = _posterior(law, *self._seen(name, len(law.means)))
        mean, covariance = self._fits[name]
        variance = float(features @ covariance @ features) + law.noise**2
        return Believed(offset + float(features @ mean), math.sqrt(variance))

    def _seen(self, name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Features and logarithms of all observations of a figure."""
        rows, values = [np.empty((0, width))], []
        for o in self.observations:
            value = o.figures.get(name)
            if value is None:
                continue
            if name == "drop":
                rows.append(_drop_features(o.choice)[None])
                values.append(math.log(max(value, FLOOR)))
            elif value > 0 and (base := self.base.get(o.artifact, {}).get(name, 0)) > 0:
                rows.append(_cost_features(o.choice)[None])
                values.append(math.log(value / base))
        return np.concatenate(rows), np.array(values)


def _cost_features(choice: Choice) -> np.ndarray:
    logs = {choice.technique: math.log(choice.keep)}
    few = (8 - choice.weight_bits) / 4
    return np.array([1.0, logs.get("channels", 0.0), logs.get("low rank", 0.0), choice.blocks, few])


def _drop_features(choice: Choice) -> np.ndarray:
    logs = {choice.technique: -math.log(choice.keep)}
    few, way = (8 - choice.weight_bits) / 4, choice.integers
    length = math.log(choice.epochs / TRAINED_EPOCHS) if choice.epochs else 0.0
    untrained = float(choice.structural and not choice.epochs)
    ways = [float(way == word) for word in ("none", "corrected", "trained")]
    bits = [few * (way != "trained"), few * (way == "trained")]
    return np.array(
        [1.0, logs.get("channels", 0.0), logs.get("low rank", 0.0), choice.blocks, length, untrained, *ways, *bits]
    )


def _posterior(law: _Law, features: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the coefficients after the observations.

    Args:
        law: The prior.
        features: (observations, coefficients).
        values: (observations,), logarithms.
    """
    precision = np.diag(1 / np.square(law.sds))
    covariance = np.linalg.inv(precision + features.T @ features / law.noise**2)
    mean = covariance @ (precision @ np.array(law.means) + features.T @ values / law.noise**2)
    return mean, covariance
