"""Quantization: fewer bits for weights and activations. One method, one file."""

from penjing.quantize.static import Static

__all__ = ["Static"]
