"""A rehearsal of a training that follows other steps, on its first batch: errors come before those steps begin."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from penjing.distill.stored import CachedTeacher, TeacherCache
from penjing.distill.teaching import Distiller, in_fp32, teacher_view, teachers
from penjing.modes import in_eval_mode
from penjing.randomness import preserve_rng_state, seed_everything, seed_of
from penjing.steps.step import Context
from penjing.tasks.call import as_call, to_tensors
from penjing.tasks.outputs import first_output, to_tensor
from penjing.tasks.task import Task
from penjing.train.data import count, explained, loader, pair, same_generators, seed_generators
from penjing.train.finetune import Finetune
from penjing.train.objective import Batch, Objective


def rehearse(training: Finetune, network: fx.GraphModule, task: Task, changed: bool, seed: int) -> None:
    """Teachers answer the example, and the first batch gets a loss. Nothing is trained.

    Args:
        training: Its settings.
        network: The source network, which has the outputs of what will be trained.
        task: The user's.
        changed: What will be trained is built otherwise: values inside it can't be looked at yet.
        seed: Of the training: its first batch is looked at.

    Raises:
        TaskError: Teacher, labels, loss or batch do not fit.
    """
    place = next((t.device for t in network.state_dict().values()), None)
    context = Context(task=task, source=network, device=str(place or "cpu"), seed=seed)
    ways = tuple(way for way in training.distillations if not (changed and way.features))
    if training.teacher is not None and not training.distillations:
        ways = training.resolved(context, changed).distillations
    data = loader(task, training.task_loss_weight)
    objective = Objective(task, training.losses, training.task_loss_weight, training.label_smoothing)
    if changed:  # they may look at the network that is trained, which is not there yet
        objective.losses = ()
    count(data, needed=False)
    named = tuple(_unwritten(one, task) for one in pytree.tree_leaves(training.teacher))
    teacher = named if isinstance(training.teacher, tuple) else named[0]
    features = [theirs for way in training.distillations for _, theirs in way.features]
    with preserve_rng_state(context.device), same_generators(data):
        if changed and features:
            teacher_view(teachers(network, teacher, context), features, task)
        teaching = Distiller(network, teacher, ways, context) if ways else None
        try:
            if teaching:
                teaching.prepare(nullcontext)
            _first_batch(training, network, context, objective, teaching, data)
        finally:
            if teaching:
                teaching.release()


class _Unwritten(nn.Module):
    """In the place of kept answers: none is written, and those of a teacher that is not there are of their shape."""

    outputs_only: ClassVar[bool] = True

    def __init__(self, answers: CachedTeacher) -> None:
        super().__init__()
        self.answers, self.teacher, self.shape = answers, answers.teacher, answers.shape

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.teacher is not None:
            said: torch.Tensor = first_output(self.teacher(*args, **kwargs))
            return said.float()
        x = next(t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim())
        assert self.shape is not None
        return torch.zeros(len(x), *self.shape, device=x.device)


def _unwritten(teacher: Any, task: Task) -> Any:
    return _Unwritten(teacher.opened(task)) if isinstance(teacher, TeacherCache) else teacher


def _first_batch(
    training: Finetune,
    network: fx.GraphModule,
    context: Context,
    objective: Objective,
    teaching: Distiller | None,
    data: Iterable[object],
) -> None:
    seed_everything(seed := seed_of(context.seed, 0))
    seed_generators(data, seed)
    first = None if isinstance(data, Iterator) else next(iter(data), None)  # what is its own iterator is not disturbed
    if first is None:
        return
    inputs, target = pair(first, training.task_loss_weight)
    call, target = to_tensors(as_call(inputs)), pytree.tree_map_only(np.ndarray, to_tensor, target)
    call, target = pytree.tree_map_only(torch.Tensor, lambda t: t.to(context.device), (call, target))
    for teacher in teaching.teachers if teaching else ():
        if isinstance(teacher, _Unwritten):
            teacher.answers.check(*call[0], **call[1])
    place = "batch 0 of epoch 0"
    with in_eval_mode(network):
        with explained("network", call, target, context.task, place):
            output = (teaching.student if teaching else network)(*call[0], **call[1])
        with explained("teacher", call, target, context.task, place):
            distilled = teaching.inputs(output, target, call, 0.0) if teaching else None
        with explained("loss", call, target, context.task, place):
            objective(Batch(call, in_fp32(output), target, network, 0))
            if teaching and distilled:
                teaching.terms(distilled)
