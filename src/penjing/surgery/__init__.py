"""The only code that edits a network. Every edit is logged as one JSON object, and a log can be replayed.

The vocabulary of edits: ``fold`` (a batch norm into the layer before it), ``split_outliers`` (a linear layer's input
channels with outliers into a layer of their own), ``unfold_attention`` (into its operators).
"""

from penjing.surgery.attention import unfold_attentions
from penjing.surgery.edits import replay
from penjing.surgery.fold import fold_batch_norms
from penjing.surgery.outliers import split_outliers
from penjing.surgery.quantizers import FakeQuantize, freeze, insert

__all__ = ["FakeQuantize", "fold_batch_norms", "freeze", "insert", "replay", "split_outliers", "unfold_attentions"]
