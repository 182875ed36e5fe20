"""Every technique before every other: what is run, on which network, and which orders are against the nature of things.

A technique joins by a line in `TECHNIQUES`; tests/conformance holds each of them to what a step promises.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from penjing import decompose, distill, measure, prune, quantize, runtimes, share
from penjing.network.capture import capture_network
from penjing.pipeline import building
from penjing.recipes.recipe import Recipe
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.surgery import insert
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from penjing.train.finetune import Finetune, train

FLOAT_DB, INTEGER_DB = 60, 30  # what an artifact has to reach beside torch, and beside its plan in torch

SHORT = Finetune(steps=3, autocast="off", learning_rate=0.01)

# name in a recipe → (family, step)
TECHNIQUES = {
    "Finetune": ("training", SHORT),
    "Finetune with a teacher": ("training", Finetune(steps=3, autocast="off", distill=distill.Logits())),
    "distill.Student": ("student", distill.Student(architecture="resnet20", settings={"width": 4})),
    "distill.FewerLayers": ("student", distill.FewerLayers(of="blocks", keep=2)),
    "decompose.LowRank": ("low rank", decompose.LowRank(macs=0.6)),
    "prune.Blocks": ("channels", prune.Blocks(blocks=1)),
    "prune.Channels": ("channels", prune.Channels(macs=0.6)),
    "prune.Iterative": ("channels", prune.Iterative(step=prune.Channels(macs=0.6), finetune=SHORT, rounds=2)),
    "prune.Regularized": ("channels", prune.Regularized(penalty="l1", strength=1e-4, finetune=SHORT)),
    "prune.Magnitude": ("zeros", prune.Magnitude(sparsity=0.5)),
    "prune.Wanda": ("zeros", prune.Wanda(sparsity=0.5)),
    "prune.SparseGPT": ("zeros", prune.SparseGPT(sparsity=0.5)),
    "prune.Movement": ("zeros", prune.Movement(sparsity=0.5, finetune=SHORT)),
    "prune.Gradual": ("zeros", prune.Gradual(step=prune.Magnitude(sparsity=0.5), finetune=SHORT)),
    "share.Layers": ("channels", share.Layers(of="blocks", every=2)),
    "share.Codebook": ("codebooks", share.Codebook(bits=4)),
    "share.Grid": ("codebooks", share.Grid(snr_db=20)),
    "share.ProductCodebook": ("codebooks", share.ProductCodebook(dimension=4, bits=4)),
    "share.ProductCodebook, two levels": ("codebooks", share.ProductCodebook(dimension=4, bits=3, levels=2)),
    "quantize.Binary": ("codebooks", quantize.Binary(finetune=SHORT)),
    "quantize.Ternary": ("codebooks", quantize.Ternary(finetune=SHORT)),
    "quantize.CrossLayerEqualization": ("equalization", quantize.CrossLayerEqualization()),
    "quantize.SmoothQuant": ("equalization", quantize.SmoothQuant()),
    "quantize.SplitOutliers": ("equalization", quantize.SplitOutliers(most=0.1)),
    "quantize.WeightClipping": ("equalization", quantize.WeightClipping(percentile=90)),
    "quantize.Static": ("integers", quantize.Static()),
    "quantize.Dynamic": ("integers", quantize.Dynamic()),
    "quantize.Best": ("integers", quantize.Best(minutes=0.02)),
    "quantize.MixedPrecision": ("integers", quantize.MixedPrecision(average_bits=6, weight_bits=(8, 4))),
    "quantize.BiasCorrection": ("repair", quantize.BiasCorrection()),
    "quantize.CoordinateRounding": ("repair", quantize.CoordinateRounding()),
    "quantize.Rollback": ("repair", quantize.Rollback(snr_db=10)),
    "quantize.QAT": ("repair", quantize.QAT(finetune=Finetune(epochs=0.1, weight_decay=1e-4))),
}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    """Residual blocks, then linear layers behind a norm: something for every technique."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8), Block(8), Block(8))
        self.norm = nn.LayerNorm(32)
        self.hidden = nn.Linear(32, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.blocks(F.relu(self.stem(x))), 2).flatten(1)
        return self.head(F.relu(self.hidden(self.norm(x))))


def task() -> Task:
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor((x - 4.9) / 6, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y)
    pairs = list(zip(x[:400].split(40), y[:400].split(40), strict=True))
    return Task(example=x[:2], train=pairs, loss=F.cross_entropy, calibration=list(x[:120].split(40)))


def trained(data: Task):
    """The captured network after a few epochs: its answers mean something."""
    torch.manual_seed(0)
    captured = capture_network(Net(), *data.call(), data.dynamic)
    return train(captured, Context(task=data), Finetune(epochs=4, learning_rate=0.05, autocast="off"))


def steps(first: str, second: str) -> tuple:
    """Both, and what they need: repairs come behind a quantizer, and `Regularized` before what removes channels."""
    sequence = []
    for name in (first, second):
        family, step = TECHNIQUES[name]
        if family == "repair" and not any(TECHNIQUES[n][0] == "integers" for n in (first,) if name == second):
            if not any(isinstance(s, quantize.Static) for s in sequence):
                sequence.append(quantize.Static())
        renamed = bool(sequence) and isinstance(sequence[0], distill.Student)
        if renamed and isinstance(step, distill.FewerLayers | share.Layers):
            step = dataclasses.replace(step, of="stages.0")  # the new network's layers have other names
        sequence.append(step)
    return tuple(sequence)


def context_of(source, data: Task, runtime: str = "onnxruntime", **fields) -> Context:
    """What steps are told, for a runtime on this machine."""
    capabilities = runtimes.get(runtime).capabilities(measure.machine(1).instruction_sets)
    return Context(task=data, source=source, capabilities=capabilities, **fields)


def artifact(recipe: Recipe, source, data: Task, folder, runtime: str = "onnxruntime", device: str = "cpu") -> dict:
    """Run the steps, build a file, run it in the runtime; what it answers beside the network in torch, in decibels."""
    context = context_of(source, data, runtime, device=device)
    draft = Draft(source)
    for step in recipe:
        draft = step(draft, context)
    return {"snr_db": parity_db(draft, data, folder, runtime), "integers": bool(draft.plan)}


def parity_db(draft: Draft, data: Task, folder, runtime: str = "onnxruntime") -> float:
    """Build a file and run it in the runtime: its answers beside those of the draft, or of its plan, in torch."""
    x = data.example[:2]
    with torch.no_grad():
        reference = (insert(draft.network, draft.plan) if draft.plan else draft.network)(x)
        _, structure = flatten_outputs(reference)
    building.build(draft, runtime, "int8" if draft.plan else "fp32", data, structure, folder)
    predict = predictor(isolated.open_artifact(folder, 1), read_manifest(folder))
    answers, reference = np.asarray(predict(x.numpy()), dtype=np.float64), reference.numpy().astype(np.float64)
    noise = ((answers - reference) ** 2).sum()
    return float(10 * np.log10((reference**2).sum() / max(noise, 1e-30)))
