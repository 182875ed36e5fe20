"""Quantization-aware training at few bits: ResNet-20 on Fashion-MNIST, compared with Brevitas.

Both sides start from the same trained network and use the same batches in the same order, the same loss (labels and the
source network's softened outputs), the same optimizer, schedule, epochs and learning-rate grid. The first and the last
layer have 8 bits, all other convolutions and both inputs of every addition the bits of the row. Settings are selected
on held-out training images with seed 0, and the test images are read once per seed at the end. Accuracy is *simulated*
in
torch: no runtime has kernels for these activations.

Brevitas: its training quantizers, per-channel weights with scales from statistics or learned after MSE initialization,
learned activation scales, ranges first calibrated with its `calibration_mode` on the same images.

    python benchmarks/qat.py [--bits 4 2] [--epochs 1.5] [--grid-epochs 0.3] [--rates 0.02 0.05 0.1] [--seeds 0 1 2]

Every finished run is written immediately; a second call resumes where the first stopped. Rows with other epochs are
kept.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
EDGE_BITS = 8
PENJING = ("penjing lsq",)
BREVITAS = ("brevitas stats", "brevitas learned")


def prepared():
    """Module, captured network and task."""
    from examples.fashion_mnist.network import resnet20
    from examples.fashion_mnist.task import task
    from penjing.network.capture import capture_network

    told = task()
    module = resnet20()
    return module, capture_network(module, *told.call()), told


def penjing(name, bits, rate, epochs, seed, raised, task):
    """Train with Penjing; return a NumPy predictor."""
    from penjing.quantize import QAT, Static
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context
    from penjing.surgery import insert
    from penjing.tasks.outputs import numpy_predictor
    from penjing.train.finetune import Finetune

    context = Context(task=task, source=raised, seed=seed)
    edge = {"weight_bits": EDGE_BITS, "activation_bits": EDGE_BITS}
    static = Static(
        weight_bits=bits, activation_bits=bits, weight_range="mse", activation_range="mse",
        settings={"conv1": edge, "classifier": edge},
    )  # fmt: skip
    draft = static(Draft(raised), context)
    draft = QAT(finetune=Finetune(epochs=epochs, learning_rate=rate, weight_decay=1e-4))(draft, context)
    return numpy_predictor(insert(draft.network, draft.plan))


def brevitas(name, bits, rate, epochs, seed, raised, task, module):
    """Train with Brevitas in the same loop; return a NumPy predictor."""
    import torch
    from brevitas.graph.calibrate import calibration_mode

    from penjing.distill import Outputs
    from penjing.steps.step import Context
    from penjing.tasks.outputs import numpy_predictor
    from penjing.train.clipping import Clip
    from penjing.train.finetune import Finetune, train

    network = brevitas_network(copy.deepcopy(module), bits, name.endswith("learned"))
    network.eval()
    with torch.no_grad(), calibration_mode(network):
        for x in task.calibration:
            network(x)
    context = Context(task=task, source=raised, seed=seed)
    settings = Finetune(epochs=epochs, learning_rate=rate, weight_decay=1e-4, clip=Clip(), distill=Outputs())
    return numpy_predictor(train(network, context, settings))


def brevitas_network(module, bits, learned):
    """The ResNet with Brevitas's quantized layers, with quantizers in the same places."""
    import brevitas.nn as qnn
    import torch
    from brevitas.quant import (
        Int8ActPerTensorFloat,
        Int8WeightPerChannelFloat,
        Int8WeightPerChannelFloatMSE,
        Uint8ActPerTensorFloat,
    )
    from torch import nn

    weights = Int8WeightPerChannelFloatMSE if learned else Int8WeightPerChannelFloat

    def convolution(conv, width):
        quantized = qnn.QuantConv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False,
            weight_quant=weights, weight_bit_width=width,
        )  # fmt: skip
        with torch.no_grad():
            quantized.weight.copy_(conv.weight)
        return quantized

    def relu():
        return qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=bits)

    def signed(width):
        return qnn.QuantIdentity(act_quant=Int8ActPerTensorFloat, bit_width=width)

    class Block(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.conv1, self.bn1 = convolution(block.conv1, bits), block.bn1
            self.conv2, self.bn2 = convolution(block.conv2, bits), block.bn2
            self.middle, self.branch, self.out = relu(), signed(bits), relu()
            self.shortcut = None
            if block.shortcut is not None:
                self.shortcut = nn.Sequential(convolution(block.shortcut[0], bits), block.shortcut[1], signed(bits))

        def forward(self, x):
            y = self.bn2(self.conv2(self.middle(self.bn1(self.conv1(x)))))
            return self.out(self.branch(y) + (x if self.shortcut is None else self.shortcut(x)))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.conv1, self.bn1, self.first = (
                signed(EDGE_BITS), convolution(module.conv1, EDGE_BITS), module.bn1, relu(),
            )  # fmt: skip
            self.stages = nn.Sequential(*(Block(b) for stage in module.stages for b in stage))
            self.average, self.last = module.average, signed(EDGE_BITS)
            head = module.classifier
            self.classifier = qnn.QuantLinear(
                head.in_features, head.out_features, bias=True, weight_quant=weights, weight_bit_width=EDGE_BITS
            )
            with torch.no_grad():
                self.classifier.weight.copy_(head.weight)
                self.classifier.bias.copy_(head.bias)

        def forward(self, x):
            x = self.first(self.bn1(self.conv1(self.input(x))))
            return self.classifier(self.last(self.average(self.stages(x)).flatten(1)))

    return Network()


def main() -> None:
    """Run all that is missing, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--grid-epochs", type=float, default=0.3)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[*PENJING, *BREVITAS])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/qat.json")
    arguments = parser.parse_args()
    import torch

    from penjing import measure

    torch.set_num_threads(THREADS)
    module, raised, task = prepared()
    data = {"machine": vars(measure.machine(THREADS)), "versions": measure.versions(), "runs": {}, "table": {}}
    data["versions"]["brevitas"] = importlib.metadata.version("brevitas")
    if arguments.out.exists():
        data |= {k: v for k, v in json.loads(arguments.out.read_text()).items() if k in ("runs", "table")}

    def ran(contestant, bits, rate, epochs, seed, judge):
        key = f"W{bits}A{bits} {contestant} rate {rate:g} epochs {epochs:g} seed {seed} {judge}"
        if key not in data["runs"]:
            start = time.perf_counter()
            if contestant in PENJING:
                predict = penjing(contestant, bits, rate, epochs, seed, raised, task)
            else:
                predict = brevitas(contestant, bits, rate, epochs, seed, raised, task, module)
            row = {"accuracy": getattr(task, judge)(predict), "seconds": time.perf_counter() - start}
            data["runs"][key] = row
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
        row = data["runs"][key]
        print(f"{key:<66}{row['accuracy']:>8.4f}{row['seconds']:>7.0f} s", flush=True)
        return row["accuracy"]

    from penjing.tasks.outputs import numpy_predictor

    data["source"] = task.evaluate(numpy_predictor(raised))
    for bits in arguments.bits:
        for side in (PENJING, BREVITAS):
            grid = [(c, rate) for c in side if c in arguments.only for rate in arguments.rates]
            if not grid:
                continue
            chosen, rate = max(grid, key=lambda g: ran(g[0], bits, g[1], arguments.grid_epochs, 0, "select"))
            accuracies = [ran(chosen, bits, rate, arguments.epochs, seed, "evaluate") for seed in arguments.seeds]
            data["table"][f"W{bits}A{bits} {side[0].split()[0]}, {arguments.epochs:g} epochs"] = {
                "settings": chosen,
                "learning_rate": rate,
                "epochs": arguments.epochs,
                "accuracy": statistics.median(accuracies),
                "lowest": min(accuracies),
                "highest": max(accuracies),
                "gap": data["source"] - statistics.median(accuracies),
            }
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\nsource {data['source']:.4f}\n{'':<30}{'settings':<18}{'rate':>7}{'accuracy':>10}{'spread':>18}{'gap':>9}")
    for name, row in data["table"].items():
        spread = f"{row['lowest']:.4f} - {row['highest']:.4f}"
        print(f"{name:<30}{row['settings']:<18}{row['learning_rate']:>7g}{row['accuracy']:>10.4f}{spread:>18}", end="")
        print(f"{row['gap']:>9.4f}")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
