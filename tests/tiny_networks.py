"""One small network per pattern, what it is called with, and exports of it in each runtime."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from penjing import runtimes
from penjing.measure import machine
from penjing.network.capture import capture_network
from penjing.numerics.signs import binary
from penjing.pipeline import building
from penjing.quantize import Static
from penjing.records.manifest import Manifest
from penjing.runtimes.artifact import arrange
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert, sign_inputs
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task, as_call


def conv(inputs, outputs, **more):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


class Residual(nn.Module):
    """Batch norm, max pooling, a residual addition, global average pooling, a 2-D linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = conv(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = F.relu(self.body(x) + x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Branches(nn.Module):
    """Depthwise convolution, concatenation, average pooling; several outputs, nested, none of them a layer's."""

    def __init__(self):
        super().__init__()
        self.wide = conv(3, 8)
        self.depthwise = conv(8, 8, groups=8)
        self.point = nn.Conv2d(8, 6, 1)
        self.other = conv(3, 6, stride=2)
        self.merge = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        a = F.relu6(self.point(F.relu6(self.depthwise(F.relu(self.wide(x))))))
        merged = torch.cat([F.avg_pool2d(a, 2), F.relu(self.other(x))], 1)
        scores = self.merge(merged)
        return scores, {"mean": scores.mean((2, 3))}


class Tokens(nn.Module):
    """Keyword inputs, 3-D beside 2-D linear layers, residual additions (one is an output), a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.shift = nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens, context):
        h = self.down(F.relu(self.up(tokens))) + tokens
        pooled = h.mean(1) + self.shift(context)
        return {"logits": self.head(pooled), "hidden": h}


class TwoInputs(nn.Module):
    """Two positional inputs of different widths."""

    def __init__(self):
        super().__init__()
        self.left = conv(3, 4)
        self.right = conv(1, 4)

    def forward(self, image, mask):
        return F.relu(self.left(image) + self.right(mask))


@dataclass(frozen=True)
class Case:
    """A network with its inputs: `shapes` are those of one sample, by position or by name."""

    build: type[nn.Module]
    shapes: Any
    integer: dict[str, int]  # operators by kind that have to run on integers
    outputs: tuple[str, ...]

    def inputs(self, samples, seed):
        random = torch.Generator().manual_seed(seed)

        def draw(shape):
            return torch.randn(samples, *shape, generator=random)

        if isinstance(self.shapes, dict):
            return {name: draw(shape) for name, shape in self.shapes.items()}
        return tuple(draw(shape) for shape in self.shapes)


CASES = {
    "residual": Case(Residual, ((3, 12, 12),), {"conv": 2, "linear": 1, "add": 1, "avg_pool": 1}, ("output",)),
    "branches": Case(Branches, ((3, 12, 12),), {"conv": 5, "cat": 1, "avg_pool": 2}, ("output_0", "output_1_mean")),
    "tokens": Case(Tokens, {"tokens": (6, 8), "context": (4,)}, {"linear": 4, "add": 2}, ("logits", "hidden")),
    "two inputs": Case(TwoInputs, ((3, 8, 8), (1, 8, 8)), {"conv": 2, "add": 1}, ("output",)),
}


@dataclass(frozen=True)
class Exported:
    """An artifact and the torch network that it should compute like."""

    case: Case
    network: fx.GraphModule  # the captured source
    reference: fx.GraphModule  # the source, or what the plan makes of it
    draft: Draft
    manifest: Manifest
    folder: Path
    task: Task
    structure: Any

    def arrays(self, samples, seed):
        """Inputs as the artifact's session takes them."""
        args, kwargs = as_call(self.case.inputs(samples, seed))
        named = {name: value.numpy() for name, value in kwargs.items()}
        return arrange(self.manifest.programs[0].inputs, tuple(value.numpy() for value in args), named)

    def answers(self, samples, seed, network=None):
        """What torch answers to the same inputs, flat."""
        args, kwargs = as_call(self.case.inputs(samples, seed))
        with torch.no_grad():
            return [leaf.numpy() for leaf in flatten_outputs((network or self.reference)(*args, **kwargs))[0]]


def export(case: Case, runtime: str, precision: str, folder: Path) -> Exported:
    """Raise, quantize for the runtime, export with an example of two samples."""
    torch.manual_seed(0)
    module = case.build()
    for part in module.modules():  # statistics that folding has to reckon with
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    task = Task(example=case.inputs(2, seed=0), calibration=[case.inputs(16, seed=seed) for seed in (1, 2)])
    network = capture_network(module.eval(), *task.call())
    if runtimes.SPECS[runtime].levels:
        _make_binary(network, "body")
    draft = Draft(network)
    if precision in building.INTEGER:
        capabilities = runtimes.get(runtime).capabilities(machine(1).instruction_sets)
        draft = Static()(draft, Context(task=task, capabilities=capabilities))
    args, kwargs = task.call()
    structure = flatten_outputs(network(*args, **kwargs))[1]
    manifest = building.build(draft, runtime, precision, task, structure, folder)
    reference = insert(draft.network, draft.plan) if draft.plan else network
    return Exported(case, network, reference, draft, manifest, folder, task, structure)


def _make_binary(network: fx.GraphModule, layer: str) -> None:
    """Let a layer multiply signs, around thresholds among its inputs."""
    sign_inputs(network, [layer])
    with torch.no_grad():
        weight = network.get_parameter(f"{layer}.weight")
        weight.copy_(binary(weight))
        network.get_parameter(f"{layer}_sign.threshold").uniform_(0.0, 0.5)
