"""VGG-16 in its CIFAR form for Fashion-MNIST, trained with Penjing's loop: the large network of several benchmarks.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015. Input (batch,
1, 28, 28), output (batch, 10) logits. With 32 channels in the first stage it has 3.7 million parameters, with the usual
64 it has 14.7 million. The weights go into the cache of the examples, under a name with a digest of the settings; an
interrupted training continues where it was saved.

    python benchmarks/vgg.py [--width 32]       trains where nothing is cached, and prints the accuracy
"""

import argparse
import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


@dataclass(frozen=True)
class Settings:
    """Of the base training: one cycle of the learning rate, bfloat16 layers where the processor has them."""

    width: int = 32
    epochs: int = 8
    batch: int = 256
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    seed: int = 0

    @property
    def path(self) -> Path:
        """The file of the trained weights."""
        from examples.data import cache

        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return cache() / f"vgg16-fashion-mnist-{digest}.safetensors"


def untrained(settings=Settings()):  # noqa: B008 (frozen)
    """VGG-16 with random weights from torch's global generator."""
    from penjing.architectures import build

    return build("vgg16_small", in_channels=1, classes=10, width=settings.width)


def trained(settings=Settings()):  # noqa: B008 (frozen)
    """The trained network in eval mode and its task; trains where the cache has no weights.

    A second process waits until the first has trained.
    """
    from safetensors.torch import load_file, save_file

    from examples.fashion_mnist.task import task as fashion_mnist_task
    from penjing.randomness import seed_everything
    from penjing.records.lock import locked
    from penjing.steps.step import Context
    from penjing.train.finetune import Finetune, train

    task = fashion_mnist_task(settings.batch)
    seed_everything(settings.seed)
    network = untrained(settings)
    if not settings.path.exists():
        state = settings.path.with_name(f"{settings.path.stem}-training")
        with locked(state, "the training of VGG-16", wait_s=7200):
            if not settings.path.exists():
                _train(network, settings, Context(task=task, seed=settings.seed, folder=state), Finetune, train)
                weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
                partial = settings.path.with_suffix(".partial")
                save_file(weights, partial)
                partial.rename(settings.path)
    network.load_state_dict(load_file(settings.path))
    return network.eval(), task


def _train(network, settings, context, step, train):
    """The base training, with its progress and its time on the screen."""
    from dataclasses import replace

    from pruning_accuracy import shown

    start = time.perf_counter()
    train(
        network,
        replace(context, events=shown("VGG-16")),
        step(epochs=settings.epochs, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay),
    )
    print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)


def main():
    """Train, and print the accuracy on held-out and on test images."""
    from penjing.tasks.outputs import numpy_predictor

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=Settings.width, help="channels of the first stage")
    network, task = trained(Settings(width=parser.parse_args().width))
    predict = numpy_predictor(network)
    print(f"held-out accuracy {task.select(predict):.4f}, test accuracy {task.evaluate(predict):.4f}")


if __name__ == "__main__":
    main()
