"""What every layer of Keras has in common when it is a module of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from penjing.errors import ExportError, PenjingError

Tensor = torch.Tensor


@dataclass(frozen=True)
class Shared:
    """An object that copies of a network share: its code, or a layer of Keras, whose weights lie elsewhere."""

    value: Any

    def __deepcopy__(self, memo: Any) -> Shared:
        return self


class Part(nn.Module):
    """A layer of Keras as a module; called in the place of the layer's `call`.

    Attributes:
        path: Its name in the network.
        origin: Where the layer stands, as a frame of a stack trace says it; None within a layer.
    """

    path: str = ""
    origin: str | None = None
    takes_training = False

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._shared = Shared(layer)

    @property
    def layer(self) -> Any:
        """The layer of Keras."""
        return self._shared.value

    @property
    def title(self) -> str:
        """The layer in a message."""
        return f"the Keras layer {self.path!r} ({type(self.layer).__name__})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes; an error names the layer while torch exports."""
        if not self.takes_training:
            kwargs.pop("training", None)
        try:
            return super().__call__(*args, **kwargs)
        except PenjingError:
            raise
        except Exception as error:
            within = any(isinstance(child, Part) for child in self.children())
            if not torch.compiler.is_exporting() or not self.path or within:
                raise
            raise ExportError(
                f"{self.title} can't be exported",
                code="keras-layer",
                got=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
                expected="a layer whose call consists of operators of torch, for every batch",
                remedy="replace it by layers that say the same in arithmetic, or compute it outside of the network",
            ) from error


class Own(Part):
    """A layer that computes by its own `call`, with its own variables as parameters of the part."""

    takes_training = True

    def __init__(self, layer: Any, variables: Any) -> None:
        super().__init__(layer)
        self._variables: list[tuple[Shared, str]] = []
        for variable in variables:
            name = str(variable.name)
            while hasattr(self, name):
                name += "_"
            tensor = value(variable)
            if tensor.is_floating_point():
                self.register_parameter(name, parameter(tensor, bool(variable.trainable)))
            else:
                self.register_buffer(name, tensor)
            self._variables.append((Shared(variable), name))

    @property
    def variables(self) -> list[tuple[Any, str]]:
        """The variables of Keras, with the names of their tensors here."""
        return [(shared.value, name) for shared, name in self._variables]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer computes."""
        layer = self.layer
        return type(layer).call(layer, *args, **kwargs)


def value(variable: Any) -> Tensor:
    """A copy of a variable's tensor, on the processor and in one piece."""
    tensor: Tensor = getattr(variable, "value", variable)
    return tensor.detach().cpu().clone().contiguous()


def parameter(tensor: Tensor, trains: bool = True) -> nn.Parameter:
    """A tensor in one piece as a parameter."""
    return nn.Parameter(tensor.contiguous(), requires_grad=trains)


def to_first(x: Tensor, last: bool) -> Tensor:
    """Channels from the last axis to axis 1, where they are last."""
    return x.permute(0, x.dim() - 1, *range(1, x.dim() - 1)) if last and x.dim() > 2 else x


def to_last(x: Tensor, last: bool) -> Tensor:
    """Channels from axis 1 to the last axis, where they are to be last."""
    return x.permute(0, *range(2, x.dim()), 1) if last and x.dim() > 2 else x


def activated(layer: Any, x: Tensor) -> Tensor:
    """The value after the layer's activation."""
    result: Tensor = x if layer.activation is None else layer.activation(x)
    return result
