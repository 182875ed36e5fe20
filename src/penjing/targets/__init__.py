"""Devices that an artifact can be made for, as data: what each computes in integers, in which formats, and its limits.

A profile is a YAML file. Those of this package lie in `profiles/`, each with the documents that its facts come from;
a user's own has the same fields. Reading one runs nothing.
"""

from __future__ import annotations

from penjing.targets.profile import Check, Limits, NumberFormats, Source, Target
from penjing.targets.reading import load, names

__all__ = ["Check", "Limits", "NumberFormats", "Source", "Target", "load", "names"]
