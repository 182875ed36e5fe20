"""Penjing makes a trained neural network small and fast, and proves that it is still the network you had.

>>> import penjing as pj
>>> pj.Goal.parse("minimize latency_ms, drop<=0.5%").max_drop
0.005
"""

from __future__ import annotations

import importlib
import random
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Copying a graph module makes torch warn about its own pytree; nobody who uses Penjing can mend that.
warnings.filterwarnings("ignore", message=r"The tensor attributes .*_flat_weights", category=UserWarning)
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)

if TYPE_CHECKING:
    from penjing import (
        architectures,
        decompose,
        distill,
        postprocess,
        preprocess,
        prune,
        quantize,
        recipes,
        records,
        share,
        tasks,
        watch,
    )
    from penjing.errors import PenjingError
    from penjing.goals.goal import Goal
    from penjing.pipeline.applied import apply
    from penjing.pipeline.compress import Result, deliver, run
    from penjing.pipeline.lossy import pack_to
    from penjing.pipeline.quick import quantize_to
    from penjing.recipes.recipe import Recipe
    from penjing.search.compress import compress
    from penjing.sources.source import load_weights
    from penjing.storage.checkpoint import restore as load_checkpoint
    from penjing.tasks.task import Task
    from penjing.train.clipping import Clip
    from penjing.train.finetune import Finetune

_HOME = {
    "Clip": "penjing.train.clipping",
    "Finetune": "penjing.train.finetune",
    "Goal": "penjing.goals.goal",
    "PenjingError": "penjing.errors",
    "Recipe": "penjing.recipes.recipe",
    "Result": "penjing.pipeline.compress",
    "Task": "penjing.tasks.task",
    "apply": "penjing.pipeline.applied",
    "compress": "penjing.search.compress",
    "deliver": "penjing.pipeline.compress",
    "load_weights": "penjing.sources.source",
    "pack_to": "penjing.pipeline.lossy",
    "quantize_to": "penjing.pipeline.quick",
    "run": "penjing.pipeline.compress",
}
_MODULES = (
    "architectures",
    "decompose",
    "distill",
    "postprocess",
    "preprocess",
    "prune",
    "quantize",
    "recipes",
    "records",
    "share",
    "tasks",
    "watch",
)

__all__ = [
    "Clip",
    "Finetune",
    "Goal",
    "PenjingError",
    "Recipe",
    "Result",
    "Task",
    "apply",
    "architectures",
    "compress",
    "decompose",
    "deliver",
    "distill",
    "load_checkpoint",
    "load_weights",
    "pack_to",
    "postprocess",
    "preprocess",
    "prune",
    "quantize",
    "quantize_to",
    "recipes",
    "records",
    "run",
    "share",
    "tasks",
    "watch",
]


def __getattr__(name: str) -> Any:
    # Loaded when used: reading a record must not import torch.
    if name in _MODULES:
        return _import(f"penjing.{name}")
    if name == "load_checkpoint":
        return _import("penjing.storage.checkpoint").restore
    if name in _HOME:
        return getattr(_import(_HOME[name]), name)
    raise AttributeError(f"module 'penjing' has no attribute {name!r}")


def _import(module: str) -> Any:
    numbers = random.getstate()
    try:
        with warnings.catch_warnings():  # what comes along sets filters and draws random numbers: the user's stay
            return importlib.import_module(module)
    finally:
        random.setstate(numbers)


def __dir__() -> list[str]:
    return sorted(__all__)
