"""The training loop of the examples: AdamW, one cycle of the learning rate, products in bfloat16."""

import time
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import nn


class Loader(Sized, Iterable[tuple[Any, Any]], Protocol):
    """(inputs, target) batches that start over, and their number."""


def train(
    network: nn.Module,
    batches: Loader,
    loss: Callable[[Any, Any], torch.Tensor],
    *,
    epochs: int,
    learning_rate: float,
    seed: int = 0,
    weight_decay: float = 0.02,
) -> nn.Module:
    """Train the network in place, print the loss of every epoch, and return the network in eval mode."""
    torch.manual_seed(seed)
    network.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=epochs * len(batches) + 1, pct_start=0.1
    )
    started = time.monotonic()
    for epoch in range(epochs):
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
        print(f"epoch {epoch + 1}/{epochs}  loss {total / len(batches):.4f}  {seconds:.0f} s", flush=True)
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
