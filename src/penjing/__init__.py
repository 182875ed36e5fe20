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
    from penjing import architectures, distill, prune, quantize, recipes, records
    from penjing.checkpoint import restore as load_checkpoint
    from penjing.clipping import Clip
    from penjing.errors import PenjingError
    from penjing.finetune import Finetune
    from penjing.recipe import Recipe
    from penjing.search.applied import apply
    from penjing.search.compress import Result, compress, deliver, run
    from penjing.search.goal import Goal
    from penjing.task import Task

_HOME = {
    "Clip": "penjing.clipping",
    "Finetune": "penjing.finetune",
    "Goal": "penjing.search.goal",
    "PenjingError": "penjing.errors",
    "Recipe": "penjing.recipe",
    "Result": "penjing.search.compress",
    "Task": "penjing.task",
    "apply": "penjing.search.applied",
    "compress": "penjing.search.compress",
    "deliver": "penjing.search.compress",
    "run": "penjing.search.compress",
}
_MODULES = ("architectures", "distill", "prune", "quantize", "recipes", "records")

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
    "deliver",
    "distill",
    "load_checkpoint",
    "prune",
    "quantize",
    "recipes",
    "records",
    "run",
]


def __getattr__(name: str) -> Any:
    # Loaded when used: reading a record must not import torch.
    if name in _MODULES:
        return _import(f"penjing.{name}")
    if name == "load_checkpoint":
        return _import("penjing.checkpoint").restore
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
