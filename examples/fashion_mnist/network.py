"""ResNet-20 for Fashion-MNIST: the demo's source network. Input (batch, 1, 28, 28), output (batch, 10) logits."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from penjing.architectures import build
from penjing.errors import CheckpointError

WEIGHTS = Path(__file__).with_name("resnet20.safetensors")


def untrained() -> nn.Module:
    """Build the network with random weights from torch's global generator."""
    return build("resnet20", in_channels=1, classes=10)


def resnet20() -> nn.Module:
    """Return the trained network in eval mode."""
    if not WEIGHTS.is_file():
        raise CheckpointError(
            "The trained weights of the example are missing.",
            code="missing",
            got=f"no file {WEIGHTS}",
            expected="a safetensors file of ResNet-20",
            remedy=f"Restore the file, or train it again: python {WEIGHTS.with_name('train.py')}",
        )
    network = untrained()
    try:
        network.load_state_dict(load_file(WEIGHTS), strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            "The example's weights can't be read into ResNet-20.",
            code="misfit",
            got=f"{WEIGHTS}: {error}",
            expected="a safetensors file of ResNet-20 with 1 input channel and 10 classes",
            remedy=f"Restore the file, or train it again: python {WEIGHTS.with_name('train.py')}",
        ) from error
    return network.eval()
