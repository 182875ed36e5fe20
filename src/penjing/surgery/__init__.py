"""The only code that edits a network. Every edit is logged as one JSON object, and an edit log can be replayed.

The edits: ``build`` (a built-in architecture replaces the network), ``factorize`` (a layer is replaced by a product of
smaller ones), ``fold`` (a batch norm is merged into the preceding layer), ``slice`` (positions of an axis are removed
from a stored tensor), ``literal`` (a number in an operator or layer is changed), ``partition`` (a split gets explicit
lengths), ``reorder`` (one selection replaces operators that permute an axis), ``skip`` (one operator's value replaces
another's, and unused operators are removed), ``sparse`` (tensors whose zeros are preserved; the network is unchanged),
``split_outliers`` (a linear layer's input channels with outliers move to a separate layer), ``divide_inputs`` (input
channels of linear layers are divided by a vector, and their weights multiplied by it), ``unfold_attention`` (an
attention becomes its operators), ``unfold_silu`` and ``unfold_hardswish`` (the function becomes its gate and a
product), ``own_weights`` (a layer that computes its weight from tied tensors gets a separate copy), ``tie`` (several
parameters become one), ``codebook`` (tensors that share the entries of a codebook; the network is
unchanged), ``residual_codebook`` (a tensor that is a sum of entries, which stand in a buffer), ``sign_inputs`` (layers
read the signs of their inputs).
"""

from penjing.surgery.attention import unfold_attentions
from penjing.surgery.build import build, building
from penjing.surgery.codebooks import looked_up, mark_codebooks, read_codebook
from penjing.surgery.edits import replay
from penjing.surgery.factorize import factorize
from penjing.surgery.fold import fold_batch_norms
from penjing.surgery.freezing import freeze
from penjing.surgery.order import reorder
from penjing.surgery.outliers import split_outliers
from penjing.surgery.own_weights import own_weights
from penjing.surgery.quantizers import FakeQuantize, insert, quantizer_calls
from penjing.surgery.residual_codebooks import store_residual
from penjing.surgery.resize import resize
from penjing.surgery.scaling import divide_inputs
from penjing.surgery.self_gates import unfold_self_gates
from penjing.surgery.sign_inputs import Sign, sign_inputs
from penjing.surgery.skip import skip
from penjing.surgery.sparse import mark_sparse
from penjing.surgery.straight_through import Grid, Listed, listed
from penjing.surgery.ties import tie

__all__ = [
    "FakeQuantize",
    "Grid",
    "Listed",
    "Sign",
    "build",
    "building",
    "divide_inputs",
    "factorize",
    "fold_batch_norms",
    "freeze",
    "insert",
    "listed",
    "looked_up",
    "mark_codebooks",
    "mark_sparse",
    "own_weights",
    "quantizer_calls",
    "read_codebook",
    "reorder",
    "replay",
    "resize",
    "sign_inputs",
    "skip",
    "split_outliers",
    "store_residual",
    "tie",
    "unfold_attentions",
    "unfold_self_gates",
]
