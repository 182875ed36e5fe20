"""Replaying an edit log on a freshly captured source."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import fx

from penjing.errors import CheckpointError
from penjing.steps.draft import Edit
from penjing.surgery.attention import unfold_attention
from penjing.surgery.build import build
from penjing.surgery.codebooks import mark_codebooks
from penjing.surgery.factorize import factorize
from penjing.surgery.fold import fold_batch_norm
from penjing.surgery.outliers import split_outliers
from penjing.surgery.own_weights import give_own_weights
from penjing.surgery.residual_codebooks import make_room
from penjing.surgery.resize import RESIZING, resize
from penjing.surgery.scaling import divide_inputs
from penjing.surgery.self_gates import GATES, unfold_self_gate
from penjing.surgery.sign_inputs import sign_inputs
from penjing.surgery.skip import skip
from penjing.surgery.sparse import mark_sparse
from penjing.surgery.ties import tie

_EDITS: dict[str, Callable[[fx.GraphModule, Edit], object]] = {
    "build": lambda network, edit: build(edit),
    "codebook": lambda network, edit: mark_codebooks(
        network, edit["tensors"], **{word: edit[word] for word in ("rows", "dimension", "proportional")}
    ),
    "divide_inputs": lambda network, edit: divide_inputs(network, edit["layers"]),
    "factorize": lambda network, edit: factorize(network, edit["layer"], edit["form"], edit["ranks"]),
    "fold": lambda network, edit: fold_batch_norm(network, edit["layer"], edit["norm"]),
    "own_weights": lambda network, edit: give_own_weights(network, edit["sites"]),
    "residual_codebook": make_room,
    "sign_inputs": lambda network, edit: sign_inputs(network, edit["layers"]),
    "skip": lambda network, edit: skip(network, edit["last"], edit["by"]),
    "sparse": lambda network, edit: mark_sparse(network, edit["tensors"]),
    "split_outliers": lambda network, edit: split_outliers(network, edit["layers"], edit["channels"]),
    "tie": lambda network, edit: tie(network, edit["groups"]),
    "unfold_attention": lambda network, edit: unfold_attention(network, edit["site"]),
    **dict.fromkeys(
        (f"unfold_{what}" for what in GATES),
        lambda network, edit: unfold_self_gate(network, edit["site"], edit["edit"].removeprefix("unfold_")),
    ),
    **dict.fromkeys(RESIZING, lambda network, edit: resize(network, (edit,))),
}


def replay(network: fx.GraphModule, edits: Iterable[Edit]) -> fx.GraphModule:
    """Apply `edits` in order to a copy of `network`.

    Raises:
        CheckpointError: An edit is unknown, or names a layer that this network does not have.
    """
    network = copy.deepcopy(network)
    for position, edit in enumerate(edits):
        apply = _EDITS.get(str(edit.get("edit")))
        if apply is None:
            raise CheckpointError(
                f"edit {position} of the checkpoint is unknown",
                code="unknown-edit",
                got=edit,
                expected=f"one of {sorted(_EDITS)}",
                remedy="pip install --upgrade penjing",
            )
        try:
            edited = apply(network, edit)
            network = edited if isinstance(edited, fx.GraphModule) else network
        except CheckpointError:
            raise
        except Exception as error:  # an edit from an untrusted file can fail in many ways
            raise CheckpointError(
                f"edit {position} of the checkpoint does not fit this network",
                code="misfit",
                got=f"{edit} ({error})"[:1000],
                expected="the network that the checkpoint was made from",
                remedy="load it with the same factory and the same version of its code",
            ) from None
    return network
