"""What a choice is believed to give before it is tried: figures and their uncertainty, learned from what was measured.

Every figure is a power law of what is kept, relative to the same artifact of the unchanged network, so its logarithm is
linear; the coefficients have a prior and are updated by Bayesian linear regression (Bishop, "Pattern Recognition and
Machine Learning", 2006, section 3.3). What a figure costs has coefficients that all artifacts share and, for each of
them, its own deviation: a call's overhead weighs more in integers than in floating point. A drop is the sum of what the
structure and what the integers cost, each with a law of its own. A choice is worth its expected improvement of the
objective over the best that meets the goal (Mockus et al., 1978), times the probability that it keeps every limit
(Schonlau, Welch & Jones, 1998).

The priors are what pruning and quantization usually do; a handful of trials outweighs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from penjing.search.choice import Choice

NORMAL = NormalDist()
USUAL_EPOCHS = 2.0  # of the training that the prior of drops speaks of
ROUNDS = 3  # of fitting coefficients and noise in turn
SURE = 4.0  # observations that the prior of a law's noise counts as
FLOOR = 3e-4  # a drop below this share of the metric counts as this
OWN = 0.8  # the prior deviation of an artifact's coefficient from that of all, as a share of the coefficient's own


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
    """Of a figure that grows with that power of the multiply-accumulates that are kept.

    Where few bits matter to it, so does how well trained integers use them.
    """
    means = (0.0, power, 0.7 * power, -0.05 * power, few_bits, 0.0)
    return _Law(means, (0.02, 0.25, 0.35, 0.05, 0.15, 0.1 if few_bits else 1e-3), 0.04)


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
# intercept, channels, low rank, blocks, length of the training, without training
_STRUCTURE = _Law((math.log(0.002), 1.4, 1.4, 0.33, -0.5, 4.0), (1.0, 0.5, 0.7, 0.2, 0.3, 1.5), 0.5)
# intercept, corrected, trained, few bits by rounding, by training, and less of it with bits for every layer
_INTEGERS = _Law((math.log(0.002), 0.5, -0.2, 1.8, 0.7, -0.3), (1.0, 0.5, 0.4, 1.0, 0.5, 0.3), 0.5)
_PARTS = ("structure", "integers")  # of drops
_LEAST_PART = 0.3  # of a measured drop, that a structure accounts for whatever its integers are believed to


class Beliefs:
    """Predictions from a prior and from observations.

    Args:
        observations: What was measured so far, the unchanged network in every runtime and precision among it.
        floor: Drops below it, as a share of the metric, count as this.
        usual: Passes over the data of the training that the prior of drops speaks of.
    """

    def __init__(self, observations: Sequence[Observation], floor: float = FLOOR, usual: float = USUAL_EPOCHS) -> None:
        self.observations, self.floor, self.usual = observations, floor, usual
        unchanged = [o for o in observations if not o.choice.structural and not o.choice.epochs]
        self.base = {o.artifact: o.figures for o in unchanged if o.choice.weight_bits == 8}
        self._fits: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}

    @property
    def artifacts(self) -> tuple[str, ...]:
        """Runtimes and precisions of which the unchanged network's figures are known."""
        return tuple(self.base)

    def imagined(self, choice: Choice) -> list[Observation]:
        """What a choice would give if every figure were as expected."""
        rows = []
        for artifact in self.base:
            rows.append(Observation(choice=choice, artifact=artifact, figures=self.figures(choice, artifact)))
        return rows

    def figures(self, choice: Choice, artifact: str, scale: float = 1.0) -> dict[str, float]:
        """Medians of all figures that an artifact is believed to have; drops as shares of the metric, times `scale`."""
        names = ("drop", *_COSTS)
        figures = {name: b.value for name in names if (b := self.figure(name, choice, artifact)) is not None}
        return figures | {"drop": scale * figures["drop"]}

    def figure(self, name: str, choice: Choice, artifact: str) -> Believed | None:
        """What a figure of an artifact will be; None where nothing tells."""
        if name == "drop":
            return self._drop(choice)
        base = self.base.get(artifact, {}).get(name)
        if name not in _COSTS or not base or base <= 0:
            return None
        law = _apart(_COSTS[name], len(self.base))
        return self._predicted(name, law, self._cost_features(choice, artifact), math.log(base))

    def _predicted(self, name: str, law: _Law, features: np.ndarray, offset: float) -> Believed:
        if name not in self._fits:
            self._fits[name] = _posterior(law, *self._seen(name, len(law.means)))
        mean, covariance, noise = self._fits[name]
        variance = float(features @ covariance @ features) + noise**2
        return Believed(offset + float(features @ mean), math.sqrt(variance))

    def _seen(self, name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Features and logarithms of all observations of a figure, or of a part of drops."""
        rows, values = [np.empty((0, width))], []
        for o in self.observations:
            if (seen := self._part(name, o) if name in _PARTS else self._cost(name, o)) is not None:
                rows.append(seen[0][None])
                values.append(seen[1])
        return np.concatenate(rows), np.array(values)

    def _cost(self, name: str, o: Observation) -> tuple[np.ndarray, float] | None:
        value, base = o.figures.get(name), self.base.get(o.artifact, {}).get(name, 0)
        if value is None or value <= 0 or base <= 0:
            return None
        return self._cost_features(o.choice, o.artifact), math.log(value / base)

    def _part(self, name: str, o: Observation) -> tuple[np.ndarray, float] | None:
        """What a measured drop tells of one of its parts: of integers where they are alone, else of the structure."""
        value, structural = o.figures.get("drop"), o.choice.structural
        if value is None or structural != (name == "structure") or not (structural or o.choice.integers != "none"):
            return None
        if structural and o.choice.integers != "none":
            integers = self._predicted("integers", _INTEGERS, _integer_features(o.choice), 0.0).value
            value = max(value - integers, _LEAST_PART * value)
        features = self._structure_features(o.choice) if structural else _integer_features(o.choice)
        return features, math.log(max(value, self.floor))

    def _drop(self, choice: Choice) -> Believed:
        """The drop of the structure and that of the integers, added."""
        parts = []
        if choice.structural:
            parts.append(self._predicted("structure", _STRUCTURE, self._structure_features(choice), 0.0))
        if choice.integers != "none":
            parts.append(self._predicted("integers", _INTEGERS, _integer_features(choice), 0.0))
        if not parts:
            return Believed(math.log(self.floor), _INTEGERS.noise)
        total = sum(part.value for part in parts)
        return Believed(math.log(total), math.hypot(*(part.value * part.sd for part in parts)) / total)

    def _structure_features(self, choice: Choice) -> np.ndarray:
        logs = {choice.technique: -math.log(choice.keep)}
        length = math.log(choice.epochs / self.usual) if choice.epochs else 0.0
        untrained = float(not choice.epochs)
        return np.array([1.0, logs.get("channels", 0.0), logs.get("low rank", 0.0), choice.blocks, length, untrained])

    def _cost_features(self, choice: Choice, artifact: str) -> np.ndarray:
        """The features of a choice, once for all artifacts and once for its own."""
        shared = _cost_features(choice)
        own = [float(artifact == name) for name in ("", *self.base)]
        own[0] = 1.0
        return np.kron(own, shared)


def _apart(law: _Law, artifacts: int) -> _Law:
    """The law with coefficients that artifacts share, and deviations of each artifact."""
    means = law.means + (0.0,) * (artifacts * len(law.means))
    return replace(law, means=means, sds=law.sds + tuple(OWN * sd for sd in law.sds) * artifacts)


def _cost_features(choice: Choice) -> np.ndarray:
    logs = {choice.technique: math.log(choice.keep)}
    few, trained = (8 - choice.weight_bits) / 4, float(choice.integers == "trained")
    return np.array([1.0, logs.get("channels", 0.0), logs.get("low rank", 0.0), choice.blocks, few, trained])


def _integer_features(choice: Choice) -> np.ndarray:
    few, trained = (8 - choice.weight_bits) / 4, float(choice.integers == "trained")
    corrected, mixed = float(choice.integers == "corrected"), few * (choice.integers == "mixed")
    return np.array([1.0, corrected, trained, few * (1 - trained), few * trained, mixed])


def _posterior(law: _Law, features: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and covariance of the coefficients after the observations, and the noise that these show.

    The noise is the law's where observations lie as near to it as that says, and more where they do not: no power law
    holds everywhere.

    Args:
        law: The prior.
        features: (observations, coefficients).
        values: (observations,), logarithms.
    """
    precision, noise = np.diag(1 / np.square(law.sds)), law.noise
    for _ in range(ROUNDS):
        covariance = np.linalg.inv(precision + features.T @ features / noise**2)
        mean = covariance @ (precision @ np.array(law.means) + features.T @ values / noise**2)
        off = float(np.square(values - features @ mean).sum())
        noise = max(law.noise, math.sqrt((SURE * law.noise**2 + off) / (SURE + len(values))))
    return mean, covariance, noise
