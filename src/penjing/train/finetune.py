"""One plain training loop, itself a step. Losses and hooks plug in; nothing hides the module.

Schedules are in `penjing.train.budget`, optimizers in `penjing.train.optimizers`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from torch import nn
from torch.utils import _pytree as pytree

from penjing.distill.teaching import opened
from penjing.steps.draft import Draft, Edit
from penjing.steps.step import Context
from penjing.surgery.codebooks import Constraints
from penjing.train.loop import carry_out
from penjing.train.parallel import Group, spread
from penjing.train.settings import TrainingSettings

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingSettings):
    """Train the network on `task.train`.

    Raises:
        RecipeError: A setting makes no sense.

    Attributes:
        epochs: Passes over `task.train`; fractions are allowed.
        steps: Updates of the weights, in the place of `epochs`.
        minutes: An upper bound. The steps that fit are counted from a few timed ones; there are fewer where the
            training turns out slower.
        learning_rate: Peak of the schedule.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        weight_decay: On weights of two and more dimensions; biases and norms are spared.
        warmup: Fraction of the steps in which the rate rises to its peak.
        schedule: How the rate goes on from its peak: "cosine" or "linear" down to zero, or "constant".
        accumulate: Batches whose gradients make one update; batch norms see each batch by itself.
        label_smoothing: Part of the labels' weight that all classes share (Szegedy et al. 2016); for losses that are
            cross-entropies of classes.
        ema: Decay of a running average of weights and statistics, for example 0.999, which is what is returned (Polyak
            & Juditsky 1992); it is shorter in the first steps. None returns the last weights.
        clip: What keeps gradients or weights within a norm (`penjing.Clip`), one or several. Without labels, gradients
            are kept within `Clip()` where nothing else is said: outputs of any size are followed, and their squares
            have no bound.
        autocast: "auto" uses bfloat16 where the processor computes it natively; "bf16" or "off" decide. On a CPU
            depthwise convolutions stay in 32 bits, in which they are faster.
        channels_last: Memory format of networks with 2-D convolutions, where it repeats to the bit.
        losses: Terms of yours that are added to `task.loss` (which `task_loss_weight=0` leaves out).
        distill: Ways to imitate a teacher (`penjing.distill`), one or several; their weighted terms are added.
            "auto" is `distill.Outputs()` where the recipe has changed the structure or removed weights before, where
            `task_loss_weight` is 0 without `losses`, and where a teacher is named.
        teacher: Who is imitated: None takes the source network, "self" the network as it is before the training; or
            any module, a ``.pt2`` file or a Hugging Face folder by its path, or `penjing.distill.TeacherCache`; or
            several of them, whose outputs are averaged.
        task_loss_weight: Weight of `task.loss`; with 0 the training needs neither labels nor a loss.
        hooks: Called at every moment of the loop.
        workers: Processes that share every batch, see `penjing.train.parallel`.
        cluster: Where they run: "local" starts Ray on this machine; else an address that `ray.init` takes.
        save_every_s: Seconds between two saved states, if the context has a folder.
    """

    stage: ClassVar[str] = "train"
    per_runtime: ClassVar[bool] = False
    for_floats: ClassVar[bool] = True

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with trained weights; zeros of `draft.sparse` stay, and so do shared entries."""
        settings = self.resolved(context, changed=bool(draft.edits))
        return replace(
            draft, network=train(copy.deepcopy(draft.network), context, settings, draft.sparse, draft.codebooks)
        )


def train(
    network: M,
    context: Context,
    settings: TrainingSettings,
    keep_zeros: Sequence[str] = (),
    codebooks: Sequence[Edit] = (),
) -> M:
    """Train `network` in place and return it in eval mode, where it was. Same seed, data and threads: same bits.

    The loader must start anew at every pass and draw its order and its augmentation from the global generators of
    torch, NumPy or `random`, which are seeded at the start of every epoch; then a resumed run continues to the same
    bits. The state to resume from is ``finetune.pt`` in `context.folder`.

    Args:
        network: A module with parameters that require gradients.
        context: Its task has the data, and the loss where labels are used.
        settings: Of the training.
        keep_zeros: Names of parameters in which what is exactly 0 stays 0.
        codebooks: Edits of `penjing.surgery.mark_codebooks`: weights that share an entry move together.

    Raises:
        TaskError: The task has no training data or no loss, or they are of the wrong form.
        TrainingError: Nothing can be trained, or the loss or a weight is not finite.
        CheckpointError: The saved state is damaged, holds code, or belongs to other settings or another network.
        OutputError: The state can't be saved.
    """
    work = functools.partial(carry_out, constraints=Constraints(keep_zeros, codebooks))
    if settings.workers > 1 and settings.cluster is not None:
        home = next((p.device for p in network.parameters()), None)
        resolved = settings.resolved(context, changed=False)
        there = lambda t: t if t is None or t == "self" else opened(t, context.task)  # noqa: E731
        resolved = replace(resolved, teacher=pytree.tree_map(there, settings.teacher))
        spread(work, network, context, resolved, settings.cluster, settings.workers)
        return network.to(home).eval()
    return work(network, context, settings, Group())  # type: ignore[return-value]
