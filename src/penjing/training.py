"""The loop that carries out a training: batches, updates, hooks, saved states."""

from __future__ import annotations

import copy
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from penjing import training_state
from penjing.autocast import caster
from penjing.averaging import Average, statistics
from penjing.call import Call, as_call, to_tensors
from penjing.clipping import Clips
from penjing.distill.stored import Answers
from penjing.errors import TaskError, TrainingError
from penjing.hooks import Moment
from penjing.objective import Batch, Objective, scalar
from penjing.outputs import to_tensor
from penjing.parallel import Group
from penjing.step import Context
from penjing.surgery.sparse import KeepZeros
from penjing.teaching import Teaching, in_fp32
from penjing.training_data import count, diverged, explained, loader, not_finite, pair

if TYPE_CHECKING:
    from penjing.finetune import Finetune

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POINTS = 100  # of a training's curve


def _channels_last_pays(device: str) -> bool:
    """Whether 2-D convolutions train faster so, and give the same bits at every run.

    With AVX2 alone, oneDNN's gradients of channels-last convolutions differ from run to run in their last bits.
    """
    return torch.device(device).type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX2"


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, NumPy and `random`."""
    torch.manual_seed(seed % 2**63)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def seed_of(seed: int, number: int) -> int:
    """Of an epoch of a training, or of a batch of an epoch."""
    return seed * 1_000_003 + number


def _frozen(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own)


class Loop:
    """One training of one network: what it is at, and how it goes on from there."""

    def __init__(self, network: nn.Module, context: Context, settings: Finetune, group: Group) -> None:
        settings = settings.resolved(context, changed=False)
        task = context.task
        data = loader(task, settings.labels)
        self.objective = Objective(task, settings.losses, settings.labels, settings.label_smoothing)
        self.home = next((p.device for p in network.parameters() if p.requires_grad), None)
        if self.home is None:
            raise TrainingError("the network has nothing to train", got="no parameter that requires a gradient")
        self.context, self.settings, self.data, self.group = context, settings, data, group
        self.network = network.to(context.device)
        conv = any(p.dim() == 4 for p in network.parameters())
        last = settings.channels_last and conv and _channels_last_pays(context.device)
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.cast = caster(settings.autocast, self.network, context.device)
        self.teaching = (
            Teaching(self.network, settings.teacher, settings.distillations, context)
            if settings.distillations
            else None
        )
        self.path = context.folder / "finetune.pt" if context.folder else None
        self.random_numbers: dict[str, Any] | None = None

    def run(self) -> nn.Module:
        """Train to the end, from where a saved state left off; the network, in eval mode, where it was."""
        try:
            with training_state.same_random_numbers(self.context.device):
                return self._run()
        finally:
            if self.teaching:
                self.teaching.release()

    def _run(self) -> nn.Module:
        # `to` also orders the strides of a single channel; `contiguous` leaves those, and depthwise layers are slow.
        for p in self.network.parameters():
            if p.dim() == 4:
                p.data = p.data.to(memory_format=self.memory_format)
        if self.teaching:
            self.teaching.prepare(self.cast)
        self.optimizer = self._optimizer()
        self.average = Average(self.network, self.settings.ema) if self.settings.ema is not None else None
        self.step, self.epoch, self.position = 0, 0, 0
        self.curve: list[dict[str, Any]] = []
        self.means: dict[str, float] = {}  # of the loss and its terms, over the last steps
        self.terms: dict[str, float] = {}  # of this step; with several workers, of this one's parts
        self.clips = Clips(self.settings.clips)
        self.length = count(self.data, needed=self.settings.steps is None)
        # Now: what hooks and losses remember may show in their repr.
        self.request = training_state.plain(self._request())
        if self.teaching and any(isinstance(teacher, Answers) for teacher in self.teaching.teachers):
            self._check_reproducible()
        if not self._restore():
            self.steps = self.group.first(self._count_steps())
            self._save()  # the count may come from timings: a resumed run must not count again
        seed_everything(self.context.seed)
        self._hook("start")
        saved = time.monotonic()
        while self.step < self.steps:
            for group in self._groups():
                self._update(group)
                if self.step >= self.steps:
                    break
                # The first worker's clock counts: all have to meet in what is summed for the saved state.
                if self.group.first(time.monotonic() - saved > self.settings.save_every_s):
                    self._save()
                    saved = time.monotonic()
            if self.step < self.steps or self.position >= self.length:
                self.epoch, self.position = self.epoch + 1, 0
                self._hook("epoch")
                self.clips.tell(self.context.events, self.step)
        self.clips.tell(self.context.events, self.step)
        self.context.events("trained", curve=self.curve)
        if self.average is not None:
            held = (hook.tensors for hook in self.settings.hooks if isinstance(hook, KeepZeros))
            self.average.into(self.network, itertools.chain.from_iterable(held))
        self._hook("end")
        return self._finished()

    def _finished(self) -> nn.Module:
        if broken := [name for name, p in self.network.named_parameters() if not torch.isfinite(p).all()]:
            raise diverged("a weight is not finite after training", ", ".join(broken[:3]))
        for tensor in [*self.network.parameters(), *self.network.buffers()]:
            tensor.data = tensor.data.to(memory_format=torch.contiguous_format)
        self.network.zero_grad(set_to_none=True)
        return self.network.to(self.home).eval()

    def _groups(self) -> Iterator[list[tuple[Any, Any]]]:
        """The rest of this epoch's batches, as many together as make one update; the last ones may be fewer."""
        self.network.train()
        for module in self.network.modules():
            if isinstance(module, _BATCH_NORMS) and _frozen(module):
                module.eval()
        self._hook("pass")
        batches = self._batches()
        while group := list(itertools.islice(batches, self.settings.accumulate)):
            yield group

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        """The rest of this epoch's batches."""
        seed_everything(seed_of(self.context.seed, self.epoch))
        batches = iter(self.data)
        for _ in range(self.position):
            next(batches, None)
        if self.random_numbers is not None and self.position:
            training_state.set_random_numbers(self.random_numbers, self.context.device)
        came = self.position > 0
        for batch in batches:
            came = True
            yield pair(batch, self.settings.labels)
        if not came:
            raise TaskError(
                f"the training data gave no batch in epoch {self.epoch}",
                got=f"a {type(self.data).__name__}" + (f" that gave {self.length} before" if self.epoch else ""),
                expected="data that starts anew at every pass",
                remedy="give a list, a DataLoader, or an object whose __iter__ starts anew",
            )

    def _update(self, batches: list[tuple[Any, Any]]) -> None:
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        value, self.terms = 0.0, {}
        for number, (inputs, target) in enumerate(batches):
            position = self.position + number
            self.place = f"batch {position} of epoch {self.epoch}"
            value += self.group.sum(self._backward(inputs, target, 1 / len(batches), position))
            if not math.isfinite(value):
                raise not_finite(self.step, to_tensors(as_call(inputs)), self.terms, value)
        self.group.sum_gradients(p for g in self.optimizer.param_groups for p in g["params"])
        self._hook("gradients")
        self.clips.apply("gradients", self.network)
        self.optimizer.step()
        self.clips.apply("weights", self.network)
        self.group.average(statistics(self.network))
        self.step += 1
        self.position += len(batches)
        self._remember({"": value} | self.terms)
        self._hook("step")
        if self.average is not None:
            self.average.update(self.network, self.step)
        self._tell(rate)

    def _remember(self, values: dict[str, float]) -> None:
        """Take a step into the means: over a tenth of the training, at most 50 steps."""
        weight = 1 / min(max(self.steps / 10, 1.0), 50.0)
        weight = max(weight, 1 / self.step)  # the first steps count alike
        for name, value in values.items():
            self.means[name] = self.means.get(name, value) * (1 - weight) + value * weight

    def _tell(self, rate: float) -> None:
        loss = round(self.means[""], 5)
        self.context.events("progress", label="fine-tune", done=self.step, total=self.steps, loss=loss)
        if self.step % max(1, self.steps // POINTS) == 0 or self.step == self.steps:
            point: dict[str, Any] = {"step": self.step, "loss": loss, "rate": rate}
            point["terms"] = {name: mean for name, mean in self.means.items() if name in self.terms}
            self.curve.append(point)
            self.context.events("training", steps=self.steps, **point)

    def _backward(self, inputs: Any, target: Any, part: float, position: int) -> float:
        """Add the gradients of this worker's part of a batch; the loss, weighted as they are."""
        call, target = to_tensors(as_call(inputs)), pytree.tree_map_only(np.ndarray, to_tensor, target)
        if self.group.size == 1:
            return self._gradients(call, target, part)
        call, target, share = self.group.part(call, target)
        # What dropout draws is each worker's own; the loaders draw on as if there were one worker.
        with torch.random.fork_rng(devices=[]):
            batch = seed_of(seed_of(self.context.seed, self.epoch), position)
            torch.manual_seed((batch * self.group.size + self.group.rank) % 2**63)
            return self._gradients(call, target, part, share) if share else 0.0

    def _gradients(self, call: Call, target: Any, part: float, share: float = 1.0) -> float:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._place, call)
        target = pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.context.device), target)
        task = self.context.task
        with self.cast():
            with explained("the network", call, target, task, self.place):
                output = (self.teaching.student if self.teaching else self.network)(*args, **kwargs)
            with explained("the teacher", call, target, task, self.place):
                done = self.step / self.steps
                lesson = self.teaching.lesson(output, target, (args, kwargs), done) if self.teaching else None
        batch = Batch((args, kwargs), in_fp32(output), target, self.network, self.step)
        with explained("the loss", call, target, task, self.place):
            terms = self.objective(batch)
            if self.teaching and lesson:
                terms += [(name, scalar(term)) for name, term in self.teaching.terms(lesson).items()]
        values = torch.stack([term for _, term in terms])
        loss = values.sum() * (part * share)
        if not loss.requires_grad:
            raise TrainingError(
                "the loss has no gradient",
                got=", ".join(name for name, _ in terms) + ": no way back to a weight",
                expected="a loss that is computed from the network's output by torch",
                remedy="leave out .detach(), .numpy() and torch.no_grad() in the loss and in the network",
            )
        loss.backward()  # type: ignore[no-untyped-call]
        # All at once, and behind the way back: a GPU is waited for once in a step.
        *found, value = torch.stack([*values.detach(), loss.detach()]).tolist()
        for (name, _), each in zip(terms, found, strict=True):
            self.terms[name] = self.terms.get(name, 0.0) + part * each
        return float(value)

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.context.device)
        return tensor.to(memory_format=self.memory_format) if tensor.dim() == 4 else tensor

    def _rate(self) -> float:
        warm = max(1, round(self.settings.warmup * self.steps))
        if self.step < warm:
            return self.settings.learning_rate * (self.step + 1) / warm
        done = (self.step - warm) / max(1, self.steps - warm)
        return self.settings.learning_rate * SCHEDULES[self.settings.schedule](done)

    def _optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.network.parameters() if p.requires_grad]
        trained += self.teaching.adapters.parameters() if self.teaching else []
        weights, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
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

    def _check_reproducible(self) -> None:
        """Stored answers are found by what was asked: the same seed has to give the same samples."""
        first, again = (pytree.tree_leaves(to_tensors(as_call(next(self._batches())[0]))) for _ in range(2))
        pairs = zip(first, again, strict=True)
        if not all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs):
            raise TaskError(
                "a teacher's answers can't be stored for data that differ at every pass",
                got="two passes with one seed, whose first batches differ",
                expected="order and augmentation drawn from the global generators of torch, NumPy or random",
                remedy="seed the augmentation so, or give the network itself as the teacher",
            )

    def _count_steps(self) -> int:
        updates = self.length / self.settings.accumulate
        steps = self.settings.steps or max(1, round(self.settings.epochs * math.ceil(updates)))
        if self.settings.minutes is None:
            return steps
        return max(1, min(steps, int(self.settings.minutes * 60 / self._seconds_a_step())))

    def _seconds_a_step(self) -> float:
        """Time of a few steps on a copy, loading included: what a count of steps is made of that can be kept."""
        probe = copy.copy(self)
        probe.network = copy.deepcopy(self.network)
        probe.teaching = self.teaching.of(probe.network) if self.teaching else None
        probe.settings = replace(self.settings, hooks=())
        probe.optimizer = probe._optimizer()
        probe.average = copy.deepcopy(self.average)
        probe.clips = Clips(self.settings.clips)
        probe.steps, probe.context = 1000, replace(self.context, events=lambda *a, **k: None)
        times, start = [], time.perf_counter()
        for _, group in zip(range(8), probe._groups(), strict=False):
            probe._update(group)
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
        usual = float(np.mean(times[1:] or times))
        begin = max(0.0, times[0] - usual) / max(1.0, self.length / self.settings.accumulate)  # once in every epoch
        return usual + begin

    def _save(self) -> None:
        if self.path is None:
            return
        adapters = self.group.each(self.teaching.adapters.state_dict() if self.teaching else {})
        if self.group.rank:
            return
        state = {
            "request": self.request,
            "numbers": [self.step, self.epoch, self.position, self.steps],
            "means": self.means,
            "curve": self.curve,
            "network": self.network.state_dict(),
            "adapters": adapters,
            "average": self.average.state_dict() if self.average is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "random": training_state.random_numbers(self.context.device),
        }
        training_state.save(self.path, state)
        self.group.saved(self.path)

    def _restore(self) -> bool:
        if self.path is None or not self.path.exists():
            return False
        with training_state.loading(self.path, self.request) as state:
            self.step, self.epoch, self.position, self.steps = map(int, state["numbers"])
            self.means, self.curve = dict(state["means"]), list(state["curve"])
            self.network.load_state_dict(state["network"])
            if self.teaching:
                self.teaching.adapters.load_state_dict(state["adapters"][self.group.rank])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.random_numbers = state["random"]
            training_state.set_random_numbers(self.random_numbers, self.context.device)
        self.context.events("resumed", step=f"fine-tuning, {self.step} of {self.steps} steps")
        return True

    def _request(self) -> dict[str, Any]:
        """What must be the same for a resumed run to end in the same bits."""
        found = vars(self.settings) | {"seed": self.context.seed, "number of batches": self.length}
        found["teacher"] = self.teaching.digest() if self.teaching else None
        return {name: value for name, value in found.items() if name not in ("save_every_s", "cluster")}
