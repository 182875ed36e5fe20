"""One plain training loop, itself a step. Losses and hooks plug in; nothing hides the module.

Stochastic gradient descent with warm-up and a cosine schedule: Loshchilov & Hutter, "SGDR", ICLR 2017.
AdamW: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from penjing.draft import Draft
from penjing.errors import CheckpointError, PenjingError, TaskError
from penjing.step import Context
from penjing.task import as_call


M = TypeVar("M", bound=nn.Module)


class TrainingError(PenjingError):
    """Training that can't go on."""


@dataclass(frozen=True)
class Batch:
    """What a loss sees: the call that was made, its output, the target, the network and the step's number."""

    call: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any
    target: Any
    network: nn.Module
    step: int


@dataclass(frozen=True)
class Moment:
    """What a hook sees. `name` is "start", "gradients" (after backward), "step" (after the update), "epoch", "end"."""

    name: str
    network: nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    steps: int


class Loss(Protocol):
    """One term of the training loss: a scalar tensor from a `Batch`."""

    def __call__(self, batch: Batch) -> torch.Tensor: ...


class Hook(Protocol):
    """Called at every `Moment`; may change weights or gradients in place."""

    def __call__(self, moment: Moment) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Train the network on `task.train`.

    Attributes:
        epochs: Passes over `task.train`; fractions are allowed.
        minutes: An upper bound. The steps that fit are counted once, from timed steps, and then kept.
        learning_rate: Peak of the schedule.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        weight_decay: On weights of two and more dimensions; biases and norms are spared.
        warmup: Fraction of the steps in which the rate rises to its peak; then a cosine down to zero.
        max_grad_norm: Clip the gradient's L2 norm (Pascanu et al. 2013); None leaves it alone.
        autocast: "auto" uses bfloat16 where the processor computes it natively; "bf16" or "off" decide.
        channels_last: Memory format of networks with 2-D convolutions.
        losses: Terms that are summed; empty takes `task.loss` alone.
        hooks: Called at every moment of the loop.
        save_every_s: Seconds between two saved states, if the context has a folder.
    """

    epochs: float = 1.0
    minutes: float | None = None
    learning_rate: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 5e-4
    warmup: float = 0.05
    max_grad_norm: float | None = None
    autocast: Literal["auto", "bf16", "off"] = "auto"
    channels_last: bool = True
    losses: tuple[Loss, ...] = ()
    hooks: tuple[Hook, ...] = ()
    save_every_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "save_every_s"):
            if not getattr(self, name) > 0:
                raise TaskError(f"Finetune({name}=...) can't be used", got=getattr(self, name), expected="above 0")

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with trained weights."""
        return replace(draft, network=train(copy.deepcopy(draft.network), context, self))


def train(network: M, context: Context, settings: Finetune) -> M:
    """Train `network` in place and return it in eval mode. Same seed, data and threads: same bits.

    The loader must draw its order and its augmentation from the global generators of torch, NumPy or `random`,
    which are seeded at the start of every epoch; then a resumed run continues to the same bits.

    Raises:
        TaskError: The task has no training data or no loss.
        TrainingError: The loss is not finite.
    """
    return _Loop(network, context, settings).run()  # type: ignore[return-value]


def bf16_pays(device: str) -> bool:
    """Whether training in bfloat16 is native on this device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported()
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, NumPy and `random`."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class _Loop:
    def __init__(self, network: nn.Module, context: Context, settings: Finetune) -> None:
        task = context.task
        if task.train is None:
            raise TaskError(
                "fine-tuning needs training data",
                got="Task.train is None",
                expected="an iterable of (inputs, target)",
                remedy="give Task(train=loader, loss=...), or leave fine-tuning out of the recipe",
            )
        if not settings.losses and task.loss is None:
            raise TaskError(
                "fine-tuning needs a loss",
                got="Task.loss is None",
                expected="loss(output, target) -> scalar tensor",
                remedy="for classes: Task(loss=torch.nn.functional.cross_entropy)",
            )
        self.context, self.settings, self.data = context, settings, task.train
        self.network = network.to(context.device)
        conv = any(p.dim() == 4 for p in network.parameters())
        self.memory_format = torch.channels_last if settings.channels_last and conv else torch.contiguous_format
        bf16 = settings.autocast == "bf16" or (settings.autocast == "auto" and bf16_pays(context.device))
        self.cast: Callable[[], AbstractContextManager[Any]] = (
            (lambda: torch.autocast(torch.device(context.device).type, torch.bfloat16)) if bf16 else nullcontext
        )
        self.path = context.folder / "finetune.pt" if context.folder else None

    def run(self) -> nn.Module:
        if self.memory_format == torch.channels_last:
            for p in self.network.parameters():
                if p.dim() == 4:
                    p.data = p.data.contiguous(memory_format=torch.channels_last)
        self.optimizer = self._optimizer()
        self.step, self.epoch, self.position = 0, 0, 0
        self.loss_sum, self.loss_count = 0.0, 0
        random_state = self._restore()
        if random_state is None:
            self.steps = self._count_steps()
        self._hook("start")
        saved = time.monotonic()
        while self.step < self.steps:
            for inputs, target in self._epoch(random_state):
                random_state = None
                self._update(inputs, target)
                if self.path is not None and time.monotonic() - saved > self.settings.save_every_s:
                    self._save()
                    saved = time.monotonic()
                if self.step >= self.steps:
                    break
            else:
                self.epoch, self.position = self.epoch + 1, 0
                self._hook("epoch")
        self._hook("end")
        for p in [*self.network.parameters(), *self.network.buffers()]:
            p.data = p.data.contiguous()
        self.network.zero_grad(set_to_none=True)
        return self.network.eval()

    def _epoch(self, random_state: dict[str, Any] | None) -> Iterator[tuple[Any, Any]]:
        self.network.train()
        seed_everything(self.context.seed * 1_000_003 + self.epoch)
        batches = iter(self.data)
        for _ in range(self.position):
            next(batches)
        if random_state is not None:
            _set_random_state(random_state)
        yield from batches

    def _update(self, inputs: Any, target: Any) -> None:
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._backward(inputs, target)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is not finite at step {self.step}",
                got=value,
                expected="a finite number",
                remedy=f"a learning rate below {self.settings.learning_rate:g}, or autocast='off'",
            )
        self._hook("gradients")
        if self.settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        self.position += 1
        self.loss_sum, self.loss_count = self.loss_sum * 0.98 + value, self.loss_count * 0.98 + 1
        self._hook("step")
        self.context.events(
            "progress",
            label="fine-tune",
            done=self.step,
            total=self.steps,
            loss=round(self.loss_sum / self.loss_count, 5),
        )

    def _backward(self, inputs: Any, target: Any) -> torch.Tensor:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._place, as_call(inputs))
        target = pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.context.device), target)
        self.optimizer.zero_grad(set_to_none=True)
        with self.cast():
            output = self.network(*args, **kwargs)
        # Losses are computed in fp32: bfloat16 keeps 8 bits of a logarithm.
        output = pytree.tree_map_only(torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, output)
        batch = Batch((args, kwargs), output, target, self.network, self.step)
        terms: Iterable[Loss] = self.settings.losses or (self._task_loss,)
        loss = torch.stack([term(batch) for term in terms]).sum()
        loss.backward()
        return loss

    def _task_loss(self, batch: Batch) -> torch.Tensor:
        assert self.context.task.loss is not None
        return self.context.task.loss(batch.output, batch.target)

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.context.device)
        return tensor.contiguous(memory_format=self.memory_format) if tensor.dim() == 4 else tensor

    def _rate(self) -> float:
        warm = max(1, round(self.settings.warmup * self.steps))
        if self.step < warm:
            return self.settings.learning_rate * (self.step + 1) / warm
        done = (self.step - warm) / max(1, self.steps - warm)
        return self.settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

    def _optimizer(self) -> torch.optim.Optimizer:
        weights = [p for p in self.network.parameters() if p.requires_grad and p.dim() > 1]
        others = [p for p in self.network.parameters() if p.requires_grad and p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": weights, "weight_decay": self.settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        if self.settings.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.settings.learning_rate)
        return torch.optim.SGD(groups, lr=self.settings.learning_rate, momentum=0.9, nesterov=True)

    def _hook(self, name: str) -> None:
        for hook in self.settings.hooks:
            hook(Moment(name, self.network, self.optimizer, self.step, self.steps))

    def _count_steps(self) -> int:
        length = len(self.data) if hasattr(self.data, "__len__") else sum(1 for _ in self.data)
        if length == 0:
            raise TaskError(
                "the training data is empty",
                got="no batch",
                expected="batches of (inputs, target)",
                remedy="a generator is exhausted after one pass: give a list or a DataLoader",
            )
        steps = max(1, round(self.settings.epochs * length))
        if self.settings.minutes is None:
            return steps
        return max(1, min(steps, int(self.settings.minutes * 60 / self._seconds_a_step())))

    def _seconds_a_step(self) -> float:
        """Median time of a few updates on a copy, so that the count of steps is a number that can be kept."""
        probe = copy.copy(self)
        probe.network = copy.deepcopy(self.network)
        probe.settings = replace(self.settings, hooks=())
        probe.optimizer = probe._optimizer()
        probe.position, probe.steps, probe.context = 0, 1000, replace(self.context, events=lambda *a, **k: None)
        times = []
        for (inputs, target), _ in zip(probe._epoch(None), range(8), strict=False):
            start = time.perf_counter()
            probe._update(inputs, target)
            times.append(time.perf_counter() - start)
        return float(np.median(times[1:] or times))

    # --- saved state: tensors and plain numbers only, read with weights_only ----------------------------------

    def _save(self) -> None:
        assert self.path is not None
        state = {
            "settings": _settings_text(self.settings),
            "numbers": [self.step, self.epoch, self.position, self.steps, self.loss_sum, self.loss_count],
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": _random_state(),
        }
        aside = self.path.with_suffix(".new")
        torch.save(state, aside)
        os.replace(aside, self.path)

    def _restore(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists():
            return None
        state = _load(self.path)
        if state.get("settings") != _settings_text(self.settings):
            raise CheckpointError(
                "the saved training state belongs to other settings",
                got=state.get("settings"),
                expected=_settings_text(self.settings),
                remedy=f"resume with the settings of that run, or delete {self.path.name}",
            )
        self.step, self.epoch, self.position, self.steps = map(int, state["numbers"][:4])
        self.loss_sum, self.loss_count = state["numbers"][4:]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        random_state: dict[str, Any] = state["random"]
        return random_state


def _settings_text(settings: Finetune) -> str:
    plain = {k: v for k, v in vars(settings).items() if k not in ("losses", "hooks", "save_every_s")}
    return json.dumps(plain | {"losses": [_name(x) for x in settings.losses]}, sort_keys=True)


def _name(value: Any) -> str:
    return (
        repr(value) if hasattr(value, "__dataclass_fields__") else getattr(value, "__qualname__", type(value).__name__)
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except Exception as error:
        raise CheckpointError(
            "the saved training state can't be read",
            got=f"{path}: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
            expected="a state written by penjing.finetune: tensors and numbers, no code",
            remedy="delete the file; the step starts anew",
        ) from None


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), gauss_next],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
