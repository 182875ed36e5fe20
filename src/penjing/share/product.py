"""Product codebooks: neighbouring weights take the values of one entry together.

Gong et al., "Compressing Deep Convolutional Networks using Vector Quantization", 2014; Stock et al., "And the Bit Goes
Down: Revisiting the Quantization of Neural Networks", ICLR 2020. With several levels each vector is a sum of entries:
Chen et al., "Approximate Nearest Neighbor Search by Residual Vector Quantization", Sensors 2010.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from penjing.errors import RecipeError, SharingError
from penjing.numerics.vector_codebooks import residual_kmeans
from penjing.share.weights import matrices, sensitivities
from penjing.steps.draft import Draft, Edit
from penjing.steps.settings import NAMES, check, one_of, whole
from penjing.steps.step import Context
from penjing.surgery import mark_codebooks, store_residual

LEAST = 1e-3  # of the mean sensitivity: what every weight counts at least


@dataclass(frozen=True, kw_only=True)
class ProductCodebook:
    """Give every `dimension` neighbouring weights the nearest of a few vectors, or of their sums.

    Gong et al., 2014. A weight takes `levels` · `bits` / `dimension` bits. `Finetune` behind this step trains the
    entries. Where a layer has zeros, whole vectors have to be 0, as `prune.Magnitude(pattern="1x4")` leaves them: they
    stay 0. A layer whose outputs' weights can't be cut into vectors, or that has fewer vectors than entries, is left as
    it is, unless `layers` names it.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        dimension: Weights of a vector; they are neighbours in the stored tensor, in the same output.
        bits: 2 to this power entries of each level, 1 to 8.
        levels: Entries that are added up; the second stands for what the first leaves over.
        sensitivity: As of `share.Codebook`.
        samples: Calibration samples for the sensitivity.
        layers: Layers, or parts of the network; empty takes all.
        keep: Layers, or parts of the network, that are left as they are.
    """

    stage: ClassVar[str] = "share"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    dimension: int = 4
    bits: int = 8
    levels: int = 1
    sensitivity: Literal["auto", "outputs", "none"] = "auto"
    samples: int = 256
    layers: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(
            self,
            dimension=whole(1, 64),
            bits=whole(1, 8),
            levels=whole(1, 2),
            sensitivity=one_of("auto", "outputs", "none"),
            samples=whole(),
            layers=NAMES,
            keep=NAMES,
        )
        if self.dimension == 1 and self.levels == 1:
            raise RecipeError(
                "a product codebook of single weights is a codebook",
                code="contradiction",
                field="dimension",
                got="dimension=1, levels=1",
                expected="dimension above 1, or levels=2",
                remedy="share.Codebook",
            )

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft whose weights are values of codebooks.

        Raises:
            RecipeError: `layers` or `keep` names what does not exist.
            SharingError: No weight is left, or zeros stand beside other weights of a vector.
            CalibrationError: `sensitivity="outputs"` without calibration data.
        """
        draft = draft.copy()
        names = self._names(draft)
        weights = sensitivities(draft.network, names, context, self.sensitivity, self.samples)
        generator = torch.Generator().manual_seed(context.seed % 2**63)
        edits: list[Edit] = []
        for name in names:
            parameter = draft.network.get_parameter(name).detach()
            entries = self._share(parameter, weights[name], generator)
            if self.levels == 1:
                edits.append(mark_codebooks(draft.network, [name], dimension=self.dimension))
            else:
                edits.append(store_residual(draft.network, name, entries))
        context.events("shared", step="ProductCodebook", tensors=len(names), codebooks=len(names) * self.levels)
        return replace(draft, edits=(*draft.edits, *edits))

    def _names(self, draft: Draft) -> list[str]:
        """The parameters that get a codebook."""
        names = []
        for name in matrices(draft.network, self.layers, self.keep):
            tensor = draft.network.get_parameter(name).detach()
            fits = not tensor[0].numel() % self.dimension
            if fits and tensor.numel() // self.dimension > 1 << self.bits:
                self._check_zeros(name, tensor)
                names.append(name)
            elif self.layers:
                got = f"{1 << self.bits} entries of {self.dimension} weights for {name} of shape {tuple(tensor.shape)}"
                raise SharingError(
                    "the codebook would be as large as what it stands for" if fits else "vectors don't fit the outputs",
                    code="larger-than-tensor" if fits else "dimension",
                    got=got,
                    expected="fewer entries than vectors, and outputs that can be cut into vectors",
                    remedy="take fewer bits or another dimension, or leave the layer out with keep=",
                )
        if not names:
            raise SharingError(
                "no layer is left whose weights can be shared",
                code="nothing-to-share",
                got=f"dimension={self.dimension}, bits={self.bits}",
                expected="a layer that has more vectors than entries, and outputs that can be cut into vectors",
                remedy="take fewer bits, or another dimension",
            )
        return names

    def _check_zeros(self, name: str, tensor: torch.Tensor) -> None:
        zero = tensor.reshape(-1, self.dimension) == 0
        mixed = int((zero.any(1) & ~zero.all(1)).sum())
        if mixed:
            raise SharingError(
                f"{name} has zeros beside other weights of a vector, which would not stay 0",
                code="zeros",
                got=f"{mixed} of {len(zero)} vectors",
                expected="vectors that are 0 as a whole, or none",
                remedy=f'share.Codebook keeps single zeros; or prune in blocks, pattern="1x{self.dimension}" of a '
                "linear layer",
            )

    def _share(self, parameter: torch.Tensor, sensitivity: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Give a parameter the values of its codebooks, in place; their entries (levels, entries, dimension)."""
        vectors = parameter.reshape(-1, self.dimension)
        weights = torch.ones_like(vectors)
        if bool(sensitivity.any()):
            weights = (sensitivity / sensitivity.mean()).clamp(min=LEAST).reshape(-1, self.dimension)
        zero = (vectors == 0).all(1)
        count = (1 << self.bits) - int(zero.any())
        books, indices = residual_kmeans(vectors[~zero], weights[~zero], count, self.levels, generator)
        if zero.any():  # the first entry of each level, which stays 0
            books = torch.nn.functional.pad(books, (0, 0, 1, 0))
            indices = indices + 1
        total = books[0][indices[0]]
        for book, index in zip(books[1:], indices[1:], strict=True):
            total = total + book[index]
        vectors = vectors.clone()
        vectors[~zero] = total
        parameter.copy_(vectors.reshape(parameter.shape))
        return books


__all__ = ["ProductCodebook"]
