"""The training loop: batches, updates, hooks, saved states."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from penjing.distill.stored import CachedTeacher
from penjing.distill.teaching import Distiller, in_fp32
from penjing.errors import TaskError, TrainingError
from penjing.randomness import preserve_rng_state, rng_state, seed_everything, seed_of, set_rng_state
from penjing.steps.hooks import TrainingEvent
from penjing.steps.identity import identity
from penjing.steps.step import Context
from penjing.surgery.codebooks import Constraints
from penjing.tasks.call import Call, as_call, fingerprint, to_tensors
from penjing.tasks.outputs import to_tensor
from penjing.train import budget
from penjing.train import state as training_state
from penjing.train.averaging import Average, statistics
from penjing.train.clipping import Clips
from penjing.train.data import (
    OTHER_DATA,
    check_same,
    count,
    diverged,
    explained,
    loader,
    not_finite,
    pair,
    same_generators,
    seed_generators,
    shares,
    sized,
)
from penjing.train.objective import Batch, Objective, no_gradient, scalar
from penjing.train.optimizers import optimizer
from penjing.train.parallel import Group
from penjing.train.precision import caster, channels_last_pays
from penjing.train.settings import TrainingSettings
from penjing.train.sharing import by_argument

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POINTS = 100  # of a training's curve
PASS = 0.1  # of the minutes: as long a stream is read to learn how long it is


def _frozen(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return bool(own) and not any(p.requires_grad for p in own)


def carry_out(
    network: nn.Module, context: Context, settings: TrainingSettings, group: Group, constraints: Constraints
) -> nn.Module:
    """Train to the end, resuming from a saved state; returns the network in eval mode, on its original device."""
    settings = settings.resolved(context, changed=False)
    data = loader(context.task, settings.task_loss_weight)
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserve_rng_state(context.device))
        stack.enter_context(same_generators(data))
        loop = Loop(network, context, settings, data, group, stack, constraints)
        return loop.run()


class Loop:
    """The state of one training, and its steps."""

    def __init__(
        self,
        network: nn.Module,
        context: Context,
        settings: TrainingSettings,
        data: Any,
        group: Group,
        stack: contextlib.ExitStack,
        constraints: Constraints,
    ) -> None:
        self.objective = Objective(context.task, settings.losses, settings.task_loss_weight, settings.label_smoothing)
        self.home = next((p.device for p in network.parameters() if p.requires_grad), None)
        if self.home is None:
            got = "no parameter that requires a gradient"
            raise TrainingError("the network has no trainable parameters", code="nothing-to-train", got=got)
        self.context, self.settings, self.data, self.group = context, settings, data, group
        self.constraints = constraints
        self.network = network.to(context.device)
        conv = any(p.dim() == 4 for p in network.parameters())
        last = settings.channels_last and conv and channels_last_pays(context.device)
        self.memory_format = torch.channels_last if last else torch.contiguous_format
        self.cast = caster(settings.autocast, self.network, context.device)
        self.teaching: Distiller | None = None
        if settings.distillations:
            self.teaching = Distiller(self.network, settings.teacher, settings.distillations, context)
            stack.callback(self.teaching.release)
        # `to` also orders the strides of a single channel; `contiguous` leaves those, and depthwise layers are slow.
        for p in self.network.parameters():
            if p.dim() == 4:
                p.data = p.data.to(memory_format=self.memory_format)
        if self.teaching:
            self.teaching.prepare(self.cast)
        self.adapters = self.teaching.adapters if self.teaching else nn.ModuleList()
        self.optimizer = optimizer(settings, self.network, self.adapters)
        self.average = Average(self.network, settings.ema) if settings.ema is not None else None
        self.path = context.folder / "finetune.pt" if context.folder else None
        self.step, self.steps, self.epoch, self.position = 0, 0, 0, 0
        self.place = ""  # of the batch that is looked at, for errors
        self.curve: list[dict[str, Any]] = []
        self.means: dict[str, float] = {}  # of the loss and its terms, over the last steps
        self.terms: dict[str, float] = {}  # of this step; with several workers, of this one's parts
        self.clips = Clips(settings.clips)
        self.budget = budget.Budget(settings.minutes)
        self.length = count(data, settings.steps is None, PASS * self.budget.seconds)
        self.random_numbers: dict[str, Any] | None = None
        self.last: Any = None  # the batch that came last
        self.known: str | None = None  # what the saved state says of it
        # Before the first step: a loss may be a module, whose weights move.
        self.request = identity(self._request())

    def run(self) -> nn.Module:
        """Train to the end."""
        if self.teaching and any(isinstance(teacher, CachedTeacher) for teacher in self.teaching.teachers):
            self._check_reproducible()
        if not self._restore():
            self.steps = self.group.first(self._count_steps())
            self._save()  # the count may come from timings: a resumed run must not count again
        self.constraints.begin(self.network)
        seed_everything(self.context.seed)
        self._hook("start")
        saved = time.monotonic()
        while self.step < self.steps:
            for group in self._groups():
                self._update(group)
                self._shorten(self.budget.steps(self.step, self.steps))
                if self.step >= self.steps:
                    break
                # The first worker's clock counts: all have to meet in what is summed for the saved state.
                if self.group.first(time.monotonic() - saved > self.settings.save_every_s):
                    self._save()
                    saved = time.monotonic()
            if self.step < self.steps or self.position >= self.length:
                if self.length == math.inf and not self.epoch and self.settings.steps is None:
                    self.length = self.position
                    self._shorten(self._in_epochs())
                self.epoch, self.position = self.epoch + 1, 0
                self._hook("epoch")
                self.clips.tell(self.context.events, self.step)
        self.clips.tell(self.context.events, self.step)
        self.context.events("trained", curve=self.curve)
        if self.average is not None:
            self.average.into(self.network, self.constraints.zeros)
            self.constraints.weights(self.network)
        self._hook("end")
        return self._finished()

    def _finished(self) -> nn.Module:
        self._check_finite()
        for tensor in [*self.network.parameters(), *self.network.buffers()]:
            tensor.data = tensor.data.to(memory_format=torch.contiguous_format)
        self.network.zero_grad(set_to_none=True)
        return self.network.to(self.home).eval()

    def _check_finite(self) -> None:
        if broken := [name for name, p in self.network.named_parameters() if not torch.isfinite(p).all()]:
            raise diverged("weight-not-finite", f"a weight is not finite after step {self.step}", ", ".join(broken[:3]))

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
        seed = seed_of(self.context.seed, self.epoch)
        seed_everything(seed)
        seed_generators(self.data, seed)
        batches = iter(self.data)
        for _ in range(self.position):
            self.last = next(batches, None)
        self._check_last()
        if self.random_numbers is not None and self.position:
            set_rng_state(self.random_numbers, self.context.device)
        came = self.position > 0
        for batch in batches:
            came = True
            self.last = batch
            yield pair(batch, self.settings.task_loss_weight)
        if not came:
            raise TaskError(
                f"the training data gave no batch in epoch {self.epoch}",
                code="no-batch",
                got=f"a {type(self.data).__name__}" + (f" that gave {self.length} before" if self.epoch else ""),
                expected="data that starts anew at every pass",
                remedy="give a list, a DataLoader, or an object whose __iter__ starts anew",
            )

    def _update(self, batches: list[tuple[Any, Any]]) -> None:
        rate = budget.rate(self.settings, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        value, self.terms, parts = 0.0, {}, shares(batches)
        for number, (inputs, target) in enumerate(batches):
            position = self.position + number
            self.place = f"batch {position} of epoch {self.epoch}"
            value += self.group.sum(self._backward(inputs, target, parts[number], position))
            if not math.isfinite(value):
                raise not_finite(self.step, to_tensors(as_call(inputs)), self.terms, value)
        self.group.sum_gradients(p for g in self.optimizer.param_groups for p in g["params"])
        self._hook("gradients")
        self.constraints.gradients(self.network)
        self.clips.apply("gradients", self.network)
        self.optimizer.step()
        self.clips.apply("weights", self.network)
        self.constraints.weights(self.network)
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
        axes = by_argument(self.context.task.dynamic, self.network, call)
        call, target, share = self.group.part(call, target, axes)
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
            with explained("network", call, target, task, self.place):
                output = (self.teaching.student if self.teaching else self.network)(*args, **kwargs)
            with explained("teacher", call, target, task, self.place):
                done = self.step / self.steps
                distilled = self.teaching.inputs(output, target, (args, kwargs), done) if self.teaching else None
        batch = Batch((args, kwargs), in_fp32(output), target, self.network, self.step)
        with explained("loss", call, target, task, self.place):
            terms = self.objective(batch)
            if self.teaching and distilled:
                terms += [(name, scalar(term)) for name, term in self.teaching.terms(distilled).items()]
        values = torch.stack([term for _, term in terms])
        loss = values.sum() * (part * share)
        if not loss.requires_grad:
            raise no_gradient(name for name, _ in terms)
        loss.backward()  # type: ignore[no-untyped-call]
        # All at once, and behind the way back: a GPU is waited for once in a step.
        *each_term, value = torch.stack([*values.detach(), loss.detach()]).tolist()
        for (name, _), term in zip(terms, each_term, strict=True):
            self.terms[name] = self.terms.get(name, 0.0) + part * term
        return float(value)

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(self.context.device)
        return tensor.to(memory_format=self.memory_format) if tensor.dim() == 4 else tensor

    def _hook(self, name: str) -> None:
        for hook in self.settings.hooks:
            hook(TrainingEvent(name, self.network, self.optimizer, self.step, self.steps))

    def _check_last(self) -> None:
        """A resumed training warns where it is not given the data that it would have been given."""
        known, self.known = self.known, None
        if known is None:
            return
        other = self.position and fingerprint([as_call(self.last)]) != known
        if other or (self.epoch and getattr(self.data, "persistent_workers", False)):
            self.context.events("warning", text=OTHER_DATA)

    def _check_reproducible(self) -> None:
        check_same(*(next(self._batches())[0] for _ in range(2)))

    def _in_epochs(self) -> int:
        return max(1, round(self.settings.epochs * math.ceil(self.length / self.settings.accumulate)))

    def _count_steps(self) -> int:
        steps = self.settings.steps or (self._in_epochs() if self.length < math.inf else sys.maxsize)
        if self.settings.minutes is None:
            return steps
        self.budget.begin(self._seconds_a_step(), before=0.0)
        return max(1, int(min(steps, self.budget.fit())))

    def _shorten(self, steps: int) -> None:
        """Fewer steps than were counted: the training turned out slower, or its data shorter."""
        if self.settings.minutes is None or (steps := self.group.first(steps)) >= self.steps:
            return
        self.steps = max(self.step, steps)
        self._save()

    def _seconds_a_step(self) -> float:
        """Time of a few steps on a copy, loading included: what a count of steps is made of that can be kept."""
        probe = copy.copy(self)
        probe.network = copy.deepcopy(self.network)
        probe.teaching = self.teaching.of(probe.network) if self.teaching else None
        probe.adapters = probe.teaching.adapters if probe.teaching else self.adapters
        probe.settings = replace(self.settings, hooks=())
        probe.optimizer = optimizer(probe.settings, probe.network, probe.adapters)
        probe.average = copy.deepcopy(self.average)
        probe.clips = Clips(self.settings.clips)
        probe.steps, probe.context = 1000, replace(self.context, events=lambda *a, **k: None)
        times, start = [], time.perf_counter()
        for _, group in zip(range(budget.TIMED), probe._groups(), strict=False):
            probe._update(group)
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
        usual = float(np.mean(times[1:] or times))
        begin = max(0.0, times[0] - usual) / max(1.0, self.length / self.settings.accumulate)  # once in every epoch
        return usual + begin

    def _save(self) -> None:
        if self.path is None:
            return
        self._check_finite()  # before the last good state is written over
        adapters = self.group.each(self.adapters.state_dict())
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
            "random": rng_state(self.context.device),
            "spent": self.budget.spent,
            "last": fingerprint([as_call(self.last)]) if self.position else "",
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
            self.adapters.load_state_dict(state["adapters"][self.group.rank])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.random_numbers, self.known = state["random"], str(state["last"])
            self.budget.begin(state["spent"] / max(1, self.step), before=state["spent"])
            set_rng_state(self.random_numbers, self.context.device)
        self.context.events("resumed", step=f"fine-tuning, {self.step} of {self.steps} steps")
        return True

    def _request(self) -> dict[str, Any]:
        """What must be the same for a resumed run to end in the same bits."""
        stream = self.settings.minutes is not None and not sized(self.data)  # it is counted in the time there is
        asked = vars(self.settings) | {"seed": self.context.seed, "number of batches": None if stream else self.length}
        asked |= {"keep_zeros": self.constraints.zeros, "codebooks": self.constraints.marks}
        asked["teacher"] = self.teaching.digest() if self.teaching else None
        return {name: value for name, value in asked.items() if name not in ("save_every_s", "cluster")}
