"""Tasks: what only the user knows, which is the data, the metric, the loss, and the code they come from.

The fields have a function each that gives a `Task`: `classification`, `detection`, `segmentation`, `tagging`,
`retrieval` and `ranking`. Their metrics, on NumPy arrays, are in `penjing.tasks.metrics`; `coco` opens labelled images.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penjing.tasks import metrics
    from penjing.tasks.fields.classification import classification
    from penjing.tasks.fields.coco import coco
    from penjing.tasks.fields.detection import detection
    from penjing.tasks.fields.ranking import ranking
    from penjing.tasks.fields.retrieval import retrieval
    from penjing.tasks.fields.segmentation import segmentation
    from penjing.tasks.fields.tagging import tagging

__all__ = ["classification", "coco", "detection", "metrics", "ranking", "retrieval", "segmentation", "tagging"]


def __getattr__(name: str) -> Any:
    # Loaded when used: a part of this room is imported by what needs neither metrics nor torch.
    if name == "metrics":
        return importlib.import_module("penjing.tasks.metrics")
    if name in __all__:
        return getattr(importlib.import_module(f"penjing.tasks.fields.{name}"), name)
    raise AttributeError(f"module 'penjing.tasks' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
