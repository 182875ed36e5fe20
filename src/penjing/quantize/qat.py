"""Quantization-aware training: the network learns with its integers in place.

Straight-through gradients: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013.
Learned step size (LSQ): Esser et al., ICLR 2020. Clipping that is learned (PACT): Choi et al., 2018. Batch norms that
are frozen towards the end: Krishnamoorthi, 2018, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from penjing.analyze import lockstep
from penjing.draft import Draft
from penjing.errors import RecipeError, TaskError
from penjing.finetune import Batch, Finetune, Hook, Loss, Moment, train
from penjing.grid import broadcast, on_grid, rows
from penjing.network import site, sites, tensor_inputs
from penjing.outputs import flatten_outputs
from penjing.plan import Entry, Plan, QuantSpec
from penjing.quantize.samples import batches, chunks
from penjing.step import Context
from penjing.surgery import FakeQuantize, insert
from penjing.task import Call

METHODS = ("lsq", "pact", "ste")


@dataclass(frozen=True, kw_only=True)
class QAT:
    """Train weights, and with them the scales of the plan, behind quantizers.

    Batch norms that were folded live again while the network learns, behind their quantized layers; at the end they
    go into the scales of the weights, channel by channel, so that the integers stay what they were.

    Attributes:
        method: "lsq" learns the scales of weights and activations, "pact" the upper ends of activations, "ste"
            leaves all ranges as they are.
        data: "train" takes `Task.train`; "calibration" takes `Task.calibration` and no labels, and the source network
            alone says what is right.
        epochs: Passes over the data.
        minutes: An upper bound, see `Finetune`.
        learning_rate: Peak of the schedule.
        optimizer: "sgd" or "adamw".
        weight_decay: On weights.
        distill: Weight of the distance to the source network's outputs beside `Task.loss`; 0 leaves it out.
        temperature: Of the softened classes that are compared (Hinton et al. 2015).
        freeze_norms: Fraction of the steps after which batch norms keep their statistics.
        freeze_ranges: Fraction of the steps after which scales stay.
        autocast: As in `Finetune`; "auto" is off where weights have more than 4 bits, for bfloat16 keeps 8.
    """

    per_runtime: ClassVar[bool] = True

    method: Literal["lsq", "pact", "ste"] = "lsq"
    data: Literal["train", "calibration"] = "train"
    epochs: float = 1.0
    minutes: float | None = None
    learning_rate: float = 0.01
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 1e-4
    distill: float = 1.0
    temperature: float = 4.0
    freeze_norms: float = 0.7
    freeze_ranges: float = 0.9
    autocast: Literal["auto", "bf16", "off"] = "auto"

    def __post_init__(self) -> None:
        fine = {
            "method": (self.method in METHODS, f"one of {', '.join(METHODS)}"),
            "data": (self.data in ("train", "calibration"), "'train' or 'calibration'"),
            "distill": (0 <= self.distill < math.inf, "a number of at least 0"),
            "temperature": (0 < self.temperature < math.inf, "a number above 0"),
            "freeze_norms": (0 <= self.freeze_norms <= 1, "a fraction from 0 to 1"),
            "freeze_ranges": (0 <= self.freeze_ranges <= 1, "a fraction from 0 to 1"),
        }
        for name, (good, expected) in fine.items():
            if not good:
                raise RecipeError(f"QAT({name}=...) can't be used", got=getattr(self, name), expected=expected)
        if self.data == "calibration" and self.distill == 0:
            raise RecipeError(
                "QAT without labels and without a teacher learns nothing",
                got="data='calibration', distill=0",
                expected="distill above 0, or data='train'",
            )
        self._settings((), ())

    def __call__(self, draft: Draft, context: Context) -> Draft:
        """Return a draft with trained weights and the plan's learned scales."""
        if not draft.plan:
            return draft
        if self.data == "train" and context.task.train is None:
            raise TaskError(
                "quantization-aware training needs training data",
                got="Task.train is None",
                expected="an iterable of (inputs, target)",
                remedy="give Task(train=loader, loss=...), or QAT(data='calibration') to learn without labels",
            )
        network = learner(draft, context, self.method)
        teacher = context.source if context.source is not None else draft.network
        losses: tuple[Loss, ...] = (Distance(teacher, self.temperature, self.distill),) if self.distill else ()
        task = context.task
        if self.data == "calibration":
            task = replace(task, train=_Unlabelled(context), loss=None)
        elif task.loss is not None:
            losses = (_Labels(context), *losses)
        hooks: tuple[Hook, ...] = (_Freeze(self.freeze_norms, self.freeze_ranges),)
        bits = [e.spec.bits for edge, e in draft.plan.entries.items() if edge.endswith(":weight")]
        settings = self._settings(losses, hooks)
        if self.autocast == "auto" and max(bits, default=8) > 4:
            settings = replace(settings, autocast="off")
        return learned(draft, train(network, replace(context, task=task), settings))

    def _settings(self, losses: tuple[Loss, ...], hooks: tuple[Hook, ...]) -> Finetune:
        return Finetune(
            epochs=self.epochs,
            minutes=self.minutes,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            autocast=self.autocast,
            losses=losses,
            hooks=hooks,
        )


class Grid(torch.autograd.Function):
    """`on_grid` with straight-through gradients, and the gradient of its scale (LSQ, equation 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: QuantSpec, method: str
    ) -> torch.Tensor:
        """x any shape, scale and zero_point (scales,); see `grid.integers`."""
        y = on_grid(x.float(), scale.detach(), zero_point, spec)
        ctx.save_for_backward(x, scale, zero_point, y)
        ctx.spec, ctx.method = spec, method
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and scale."""
        (gradient,) = gradients
        x, scale, zero_point, y = ctx.saved_tensors
        spec: QuantSpec = ctx.spec
        low, high = spec.limits
        if scale.numel() == 1:
            step, zero = float(scale), int(zero_point)
            # What rounds to an integer of the grid passes; one kernel for the comparison and the product.
            of_x = torch.ops.aten.hardtanh_backward(
                gradient, x.float(), (low - zero - 0.5) * step, (high - zero + 0.5) * step
            )
        else:
            steps, zeros = broadcast(scale, x, spec), broadcast(zero_point, x, spec)
            inside = (x >= (low - zeros - 0.5) * steps) & (x <= (high - zeros + 0.5) * steps)
            of_x = torch.where(inside, gradient, 0.0)
        if not ctx.needs_input_grad[1]:
            return of_x.to(x.dtype), None, None, None, None
        if ctx.method == "pact":  # only what is cut at the upper end moves that end
            top = (high - broadcast(zero_point, x, spec)) * broadcast(scale, x, spec)
            of_scale = rows(torch.where(x > top, gradient, 0.0), spec).sum(1) * (high - zero_point)
        else:
            # Inside, the gradient is (x̂ − x) / s, outside x̂ / s: two inner products.
            of_scale = (_inner(gradient, y, spec) - _inner(of_x, x.float(), spec)) / scale
        count = x.numel() / scale.numel() / (x.shape[0] if spec.axis is None else 1)
        return of_x.to(x.dtype), of_scale.reshape(scale.shape) / math.sqrt(max(1.0, count * high)), None, None, None


def _inner(a: torch.Tensor, b: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Σ a·b of the values of every scale: (scales,)."""
    if spec.axis is not None:
        return rows(a * b, spec).sum(1)
    by_memory = sorted(range(a.dim()), key=a.stride, reverse=True)  # channels-last too is then one row
    return torch.dot(a.permute(by_memory).reshape(-1), b.permute(by_memory).reshape(-1)).reshape(1)


class Learner(nn.Module):
    """A quantizer whose scale can learn."""

    zero_point: torch.Tensor

    def __init__(self, entry: Entry, method: str) -> None:
        super().__init__()
        self.spec, self.method = entry.spec, method
        self.scale = nn.Parameter(torch.tensor(entry.scale), requires_grad=method != "ste")
        self.register_buffer("zero_point", torch.tensor(entry.zero_point, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape in, the same shape out, float32."""
        scale = self.scale.abs() + 1e-12
        result: torch.Tensor = Grid.apply(x, scale, self.zero_point, self.spec, self.method)  # type: ignore[no-untyped-call]
        return result


def learner(draft: Draft, context: Context, method: str) -> fx.GraphModule:
    """The network with quantizers that learn, and with the batch norms that were folded alive behind its layers."""
    network = insert(draft.network, draft.plan)
    weights = {f"{name}:weight" for name in sites(draft.network)}
    for edge, node in _quantizers(network, draft.plan).items():
        entry = draft.plan.entries[edge]
        fixed = entry.spec.scale == "power_of_two" or (method == "pact" and edge in weights)
        _replace(network, str(node.target), Learner(entry, "ste" if fixed else method))
    for name, module in list(network.named_modules()):
        if isinstance(module, FakeQuantize):  # of a bias: its grid follows from scales that still move
            _replace(network, name, nn.Identity())
    _revive_norms(network, draft, context)
    network.recompile()
    return network


def _quantizers(network: fx.GraphModule, plan: Plan) -> dict[str, fx.Node]:
    """Edge of the plan → the call of its quantizer in an inserted network."""
    found = {**sites(network), "output": next(n for n in network.graph.nodes if n.op == "output")}
    edges: dict[str, fx.Node] = {}
    for edge in plan.entries:
        name, _, port = edge.rpartition(":")
        node = found[name]
        edges[edge] = node.args[1] if port == "weight" else tensor_inputs(node)[int(port.removeprefix("in"))]
    return edges


def _replace(network: fx.GraphModule, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(network.get_submodule(parent), leaf, module)


_NORMS: dict[int, type[nn.Module]] = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _revive_norms(network: fx.GraphModule, draft: Draft, context: Context) -> None:
    """Put a batch norm, at first an identity, behind every layer that one was folded into."""
    folded = {str(edit["layer"]) for edit in draft.edits if edit.get("edit") == "fold"}
    wanted = {
        name
        for name in folded
        if (entry := draft.plan.entries.get(f"{name}:weight")) is not None
        and entry.spec.axis == 0
        and entry.spec.group is None
        and entry.spec.scale == "free"
        and _rank(draft, name) in _NORMS
    }
    statistics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(layer: lockstep.Layer) -> None:
        if layer.site in wanted:
            every = torch.cat([y.movedim(1, 0).flatten(1) for y in layer.twin_outputs()], 1)
            statistics[layer.site] = (every.mean(1), every.var(1, correction=0))

    lockstep.run(draft.network, draft.plan, chunks(context, draft.network, 64), watch)
    network.add_module("norms", nn.Module())
    holder = network.get_submodule("norms")
    for node in list(network.graph.nodes):
        if node.op != "call_function" or site(node) not in statistics:
            continue
        mean, variance = statistics[site(node)]
        norm: Any = _NORMS[_rank(draft, site(node))](len(mean))
        with torch.no_grad():
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.weight.copy_(torch.sqrt(variance + norm.eps))
            norm.bias.copy_(mean)
        name = site(node).replace(".", "_")
        holder.add_module(name, norm)
        with network.graph.inserting_after(node):
            call = network.graph.call_module(f"norms.{name}", (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)


def _rank(draft: Draft, layer: str) -> int:
    module: Any = draft.network.get_submodule(layer)
    return int(module.weight.dim())


def learned(draft: Draft, network: fx.GraphModule) -> Draft:
    """The draft with what `network`, made by `learner`, has learned."""
    draft = draft.copy()
    entries = dict(draft.plan.entries)
    state = network.state_dict()
    with torch.no_grad():
        for name, parameter in draft.network.named_parameters():
            if name in state:
                parameter.copy_(state[name])
        for edge, node in _quantizers(network, draft.plan).items():
            module: Any = network.get_submodule(str(node.target))
            scale = (module.scale.detach().abs() + 1e-12).float()
            layer = edge.removesuffix(":weight")
            norm: Any = getattr(network.get_submodule("norms"), layer.replace(".", "_"), None)
            if edge.endswith(":weight") and norm is not None:
                # (Ŵ·x + b − μ)·γ/σ + β: the factor of a channel goes into its scale, and the integers stay.
                factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                mine: Any = draft.network.get_submodule(layer)
                mine.weight *= factor.reshape(-1, *[1] * (mine.weight.dim() - 1))
                mine.bias.copy_((mine.bias - norm.running_mean) * factor + norm.bias)
                scale = scale * factor.abs().clamp(min=1e-12)
            entries[edge] = replace(entries[edge], scale=tuple(scale.tolist()))
    return replace(draft, plan=replace(draft.plan, entries=entries))


class Distance:
    """How far the network's outputs are from the teacher's: KL divergence of softened classes, or relative noise.

    Classes are what is compared where the task has a loss of its own, and the output is (batch, classes); without
    labels, and for all other outputs, it is the noise power over the signal power.
    """

    def __init__(self, teacher: fx.GraphModule, temperature: float, weight: float) -> None:
        self.teacher, self.temperature, self.weight = teacher.eval(), temperature, weight

    def __repr__(self) -> str:
        return f"Distance(temperature={self.temperature}, weight={self.weight})"

    def __call__(self, batch: Batch) -> torch.Tensor:
        """A scalar."""
        args, kwargs = batch.call
        with torch.no_grad():
            wanted = _floats(self.teacher(*args, **kwargs))
        found = _floats(batch.output)
        if batch.target is not None and len(found) == 1 and found[0].dim() == 2 and found[0].shape[1] > 1:
            t = self.temperature
            divergence = nn.functional.kl_div(
                nn.functional.log_softmax(found[0] / t, 1),
                nn.functional.log_softmax(wanted[0] / t, 1),
                reduction="batchmean",
                log_target=True,
            )
            return divergence * (t * t * self.weight)
        noise = torch.stack([(a - b).square().sum() for a, b in zip(found, wanted, strict=True)]).sum()
        return noise / torch.stack([b.square().sum() for b in wanted]).sum().clamp(min=1e-12) * self.weight


def _floats(output: Any) -> list[torch.Tensor]:
    return [t.float() for t in flatten_outputs(output)[0] if t.is_floating_point()]


class _Labels:
    """The task's own loss."""

    def __init__(self, context: Context) -> None:
        self.loss = context.task.loss

    def __repr__(self) -> str:
        return "Task.loss"

    def __call__(self, batch: Batch) -> torch.Tensor:
        assert self.loss is not None
        return self.loss(batch.output, batch.target)


class _Freeze:
    """Batch norms keep their statistics and scales their values after a fraction of the steps."""

    def __init__(self, norms: float, ranges: float) -> None:
        self.norms, self.ranges = norms, ranges

    def __repr__(self) -> str:
        return f"_Freeze({self.norms}, {self.ranges})"

    def __call__(self, moment: Moment) -> None:
        done = moment.step / max(1, moment.steps)
        for module in moment.network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and done >= self.norms:
                module.eval()
                module.momentum = 0.0  # the first step of an epoch sees its own statistics, and does not keep them
            if isinstance(module, Learner) and done >= self.ranges:
                module.scale.requires_grad_(False)
                module.scale.grad = None


class _Unlabelled:
    """Calibration data as training data whose target is None, in batches of 16, mixed in pairs.

    Between two samples of floating-point inputs lies another that the teacher can answer (Zhang et al., "mixup",
    ICLR 2018; Beyer et al., "Knowledge distillation: a good teacher is patient and consistent", CVPR 2022): some
    hundred samples alone would be learned by heart.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def __iter__(self) -> Iterator[tuple[Any, None]]:
        for args, kwargs in batches(self.context, 2**62):
            mixed: Call = pytree.tree_map_only(torch.Tensor, _Mix(), (args, kwargs))
            yield (mixed[1] if mixed[1] else mixed[0]), None


class _Mix:
    """Mixes half of the samples with others; every tensor of one call in the same way."""

    def __init__(self) -> None:
        self.order: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_floating_point() or x.dim() == 0:
            return x
        if self.order is None or len(self.order) != len(x):
            self.order = torch.randperm(len(x))
            part = torch.rand(len(x))
            self.part = torch.where(torch.rand(len(x)) < 0.5, torch.ones_like(part), part)
        part = self.part.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        return part * x + (1 - part) * x[self.order]
