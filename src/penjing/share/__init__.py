"""Weight sharing: weights take their values from codebooks, and layers share weights. One technique, one file."""

from penjing.share.codebook import Codebook
from penjing.share.grid import Grid
from penjing.share.layers import Layers
from penjing.share.product import ProductCodebook

__all__ = ["Codebook", "Grid", "Layers", "ProductCodebook"]
