"""Quantization: fewer bits for weights and activations. One technique per file."""

from penjing.quantize.best import Best
from penjing.quantize.bias_correction import BiasCorrection
from penjing.quantize.binary import Binary
from penjing.quantize.coordinate_rounding import CoordinateRounding
from penjing.quantize.dynamic import Dynamic
from penjing.quantize.equalization import CrossLayerEqualization
from penjing.quantize.mixed import MixedPrecision
from penjing.quantize.outliers import SplitOutliers
from penjing.quantize.qat import QAT
from penjing.quantize.rollback import Rollback
from penjing.quantize.smoothquant import SmoothQuant
from penjing.quantize.static import Static
from penjing.quantize.ternary import Ternary
from penjing.quantize.weight_clipping import WeightClipping

__all__ = [
    "QAT",
    "CoordinateRounding",
    "Best",
    "BiasCorrection",
    "Binary",
    "CrossLayerEqualization",
    "Dynamic",
    "MixedPrecision",
    "Rollback",
    "SmoothQuant",
    "SplitOutliers",
    "Static",
    "Ternary",
    "WeightClipping",
]
