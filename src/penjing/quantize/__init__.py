"""Quantization: fewer bits for weights and activations. One method, one file."""

from penjing.quantize.bias_correction import BiasCorrection
from penjing.quantize.static import Static

__all__ = ["BiasCorrection", "Static"]
