"""The only code that edits a network. Every edit is logged as one JSON object, and an edit log can be replayed.

The vocabulary of edits: ``build`` (a built-in architecture in the place of the network), ``fold`` (a batch norm into
the layer before it), ``slice`` (a stored tensor loses positions of an axis), ``literal`` (a number in an operator or
layer), ``partition`` (a split gets explicit lengths), ``reorder`` (a selection in the place of operators that permute
an axis), ``skip`` (one operator's value in the place of another's, and what lies between is gone), ``sparse`` (tensors
whose zeros stay; the network stays as it is), ``split_outliers`` (a linear layer's input channels with outliers into a
layer of their own), ``divide_inputs`` (input channels of linear layers divided by a vector and their weights multiplied
by it), ``unfold_attention`` (into its operators), ``own_weights`` (what computes its weight from tied tensors gets one
of its own).
"""

from penjing.surgery.attention import unfold_attentions
from penjing.surgery.build import build, building
from penjing.surgery.edits import replay
from penjing.surgery.fold import fold_batch_norms
from penjing.surgery.freezing import freeze
from penjing.surgery.outliers import split_outliers
from penjing.surgery.own_weights import own_weights
from penjing.surgery.quantizers import FakeQuantize, insert, quantizer_calls
from penjing.surgery.resize import resize
from penjing.surgery.scaling import divide_inputs
from penjing.surgery.skip import skip
from penjing.surgery.sparse import mark_sparse
from penjing.surgery.straight_through import Grid

__all__ = [
    "FakeQuantize",
    "Grid",
    "build",
    "building",
    "divide_inputs",
    "fold_batch_norms",
    "freeze",
    "insert",
    "mark_sparse",
    "own_weights",
    "quantizer_calls",
    "replay",
    "resize",
    "skip",
    "split_outliers",
    "unfold_attentions",
]
