"""How the examples are trained: AdamW, one cycle of the learning rate, products in bfloat16."""

import argparse
import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import nn

from examples.weights import load
from penjing.tasks.outputs import numpy_predictor
from penjing.tasks.task import Task


@dataclass(frozen=True)
class Settings:
    """How long and how fast an example is trained.

    Attributes:
        epochs: Passes over the training data.
        learning_rate: The largest of the cycle.
        weight_decay: Of AdamW.
        seed: Of the weights, the order of the data, and its augmentation.
    """

    epochs: int
    learning_rate: float
    weight_decay: float = 0.02
    seed: int = 0


class Loader(Sized, Iterable[tuple[Any, Any]], Protocol):
    """(inputs, target) batches that start over, and their number."""


def main(untrained: Callable[[], nn.Module], task: Callable[[], Task], settings: Settings, weights: Path) -> None:
    """Train an example's network, save its weights, and print the metric of what was saved.

    Args:
        untrained: Builds the network.
        task: Creates the task, with `train` and `loss`.
        settings: How it is trained; ``--epochs`` changes their number, and ``--seed`` gives another network.
        weights: The file, unless ``--out`` says another.
    """
    parser = argparse.ArgumentParser(description=f"Train the network of {weights.parent.name}, and write {weights}.")
    parser.add_argument("--epochs", type=int, default=settings.epochs)
    parser.add_argument("--seed", type=int, default=settings.seed)
    parser.add_argument("--out", type=Path, default=weights)
    arguments = parser.parse_args()
    data = task()
    network = trained(untrained, data, replace(settings, epochs=arguments.epochs, seed=arguments.seed))
    save(network, arguments.out)
    print(f"{data.metric_name} {data.evaluate(numpy_predictor(load(untrained(), arguments.out))):.4f}")


def trained(untrained: Callable[[], nn.Module], data: Task, settings: Settings) -> nn.Module:
    """Build the network and train it; return it in eval mode."""
    torch.manual_seed(settings.seed)
    return train(untrained(), data.train, data.loss, settings)


def train(
    network: nn.Module, batches: Loader, loss: Callable[[Any, Any], torch.Tensor], settings: Settings
) -> nn.Module:
    """Train the network in place, print the loss of every epoch, and return the network in eval mode."""
    torch.manual_seed(settings.seed)
    network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=settings.epochs * len(batches) + 1, pct_start=0.1
    )
    started = time.monotonic()
    for epoch in range(settings.epochs):
        total = 0.0
        for inputs, target in batches:
            inputs, target = _tensors(inputs), _tensors(target)
            with torch.autocast("cpu", torch.bfloat16):
                outputs = network(**inputs) if isinstance(inputs, dict) else network(inputs)
                value = loss(outputs, target)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            total += float(value.detach())
        seconds = time.monotonic() - started
        print(f"epoch {epoch + 1}/{settings.epochs}  loss {total / len(batches):.4f}  {seconds:.0f} s", flush=True)
    return network.eval().to(memory_format=torch.contiguous_format)


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: torch.as_tensor(array) for name, array in value.items()}
    return torch.as_tensor(value)


def save(network: nn.Module, file: Path) -> None:
    """Write the weights in float16, which halves the file; reading them into the network makes them float32 again."""
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in network.state_dict().items()
    }
    save_file(state, file)
    print(f"{file}: {file.stat().st_size} bytes")
