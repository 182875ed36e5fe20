"""Opened artifacts: how they are called, and what a runtime made of their operators."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from penjing.errors import TaskError
from penjing.records.manifest import Manifest, Port, read_manifest

__all__ = ["Executed", "Timed", "arrange", "predictor", "read_manifest"]


@dataclass(frozen=True)
class Executed:
    """One operator of a runtime's optimized graph: the source operators that it computes, its type and precision."""

    sites: tuple[str, ...]
    type: str
    precision: str  # "int8", "bf16", "fp16", "fp32"


@dataclass(frozen=True)
class Timed:
    """One operator of a runtime's optimized graph with its share of a call's time."""

    sites: tuple[str, ...]
    type: str
    ms: float


def predictor(session: Any, manifest: Manifest) -> Callable[..., Any]:
    """`predict` for a session: called as the network is called, NumPy in, NumPy out, in the network's structure."""
    from penjing.tasks.outputs import unflatten_outputs  # brings torch, which opening an artifact does not need

    ports = manifest.programs[0].inputs

    def predict(*args: Any, **kwargs: Any) -> Any:
        return unflatten_outputs(session.run(arrange(ports, args, kwargs)), manifest.structure)

    return predict


def arrange(ports: tuple[Port, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[np.ndarray]:
    """Positional and keyword inputs in the order and the types of the ports.

    A name that is not an identifier is taken with underscores, too, as the network's own forward takes it.
    """
    words = [port.name if port.name in kwargs else re.sub(r"\W", "_", port.name) for port in ports]
    values = list(args) + [kwargs[word] for word in words[len(args) :] if word in kwargs]
    if len(values) != len(ports) or len(args) + len(kwargs) != len(ports):
        raise TaskError(
            "the artifact was called with inputs that do not match its own",
            code="inputs",
            got=f"{len(args)} positional and {sorted(kwargs)}",
            expected=f"{[p.name for p in ports]}",
        )
    return [np.ascontiguousarray(np.asarray(v), dtype=p.dtype) for v, p in zip(values, ports, strict=True)]
