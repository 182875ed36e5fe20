"""The trained weights that lie beside an example."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from penjing.errors import CheckpointError


def load(network: nn.Module, file: Path) -> nn.Module:
    """Read the weights into the network, and return it in eval mode.

    Raises:
        CheckpointError: The file is missing, or of another network.
    """
    remedy = f"restore the file, or train it again: python {file.with_name('train.py')}"
    if not file.is_file():
        raise CheckpointError(
            "the trained weights of the example are missing",
            code="missing",
            got=f"no file {file}",
            expected="a safetensors file",
            remedy=remedy,
        )
    try:
        network.load_state_dict(load_file(file), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the example's weights don't fit {type(network).__name__}",
            code="misfit",
            got=f"{file}: {error}",
            expected="the weights that the example's train.py writes",
            remedy=remedy,
        ) from error
    return network.eval()
