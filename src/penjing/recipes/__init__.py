"""Recipes: their order, as Python and as YAML, and those that are known to work together."""

from penjing.recipes.by_name import NAMES, QUANTIZED, ROUNDS, SHALLOW, joint, label_free

__all__ = [
    "NAMES",
    "QUANTIZED",
    "ROUNDS",
    "SHALLOW",
    "joint",
    "label_free",
]
