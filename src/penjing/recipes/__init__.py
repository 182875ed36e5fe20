"""Recipes in Python and YAML, the catalogue of steps, and predefined recipes."""

from penjing.recipes.by_name import NAMES, QUANTIZED, ROUNDS, SHALLOW, joint, label_free

__all__ = [
    "NAMES",
    "QUANTIZED",
    "ROUNDS",
    "SHALLOW",
    "joint",
    "label_free",
]
