"""Overhead of Penjing's training loop: a step of `Finetune` compared with the same step in a bare PyTorch loop.

ResNet-20 and MobileNetV2, batches of 256 Fashion-MNIST images, SGD with Nesterov momentum, cosine schedule,
channels-last on all sides. `bare` is the module in a ten-line loop, under torch's autocast if the processor supports
bfloat16 natively; `bare, 32 bits` is without. `Finetune` trains the captured network with all its checks and events;
`stored teacher` reads the source's outputs from a file (`distill.TeacherCache`, written before) and trains on labels
and these. In interleaved rounds, each from the same weights; seconds run from the first step to the last.

    python benchmarks/training_cost.py [--steps 40] [--rounds 7] [--device cuda]
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
BATCHES = 8
RATE = 0.01


class Clock:
    """A hook that records when the first step starts and the last one ends."""

    def __call__(self, moment):
        if moment.name == "start":
            self.start = time.perf_counter()
        elif moment.name == "end":
            self.seconds = time.perf_counter() - self.start


def bare(module, batches, steps, device, bf16):
    """Seconds of a plain loop with the same settings."""
    import math

    import torch

    module = module.train().to(device, memory_format=torch.channels_last)
    kind = torch.device(device).type
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    start = time.perf_counter()
    for step in range(steps):
        x, y = (t.to(device) for t in batches[step % len(batches)])
        with torch.autocast(kind, torch.bfloat16, enabled=bf16):
            output = module(x.to(memory_format=torch.channels_last))
        loss = torch.nn.functional.cross_entropy(output.float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    if kind != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def penjing(module, task, device, settings):
    """Seconds of `Finetune` with the same settings."""
    from penjing.network.capture import capture_network
    from penjing.steps.step import Context
    from penjing.train.finetune import train

    clock = Clock()
    raised = capture_network(module, *task.call(), task.dynamic)
    train(raised, Context(task=task, source=raised, device=device), settings(clock))
    return clock.seconds


def main() -> None:
    """Run all in turns, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="the rows of a GPU are added to those of the CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/training_cost.json")
    arguments = parser.parse_args()
    import torch

    from examples.fashion_mnist.network import resnet20
    from penjing import measure
    from penjing.architectures import build

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    networks = {"ResNet-20": resnet20(), "MobileNetV2": build("mobilenet_v2", in_channels=1, classes=10).eval()}
    data = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results = {
        "machine": vars(measure.machine(THREADS)),
        "versions": measure.versions(),
        "steps": arguments.steps,
        "rows": {name: measured(name, network, arguments) for name, network in networks.items()},
    }
    if torch.device(arguments.device).type == "cpu":
        data |= results
    else:
        data["gpu"] = results | {"device": torch.cuda.get_device_name(arguments.device)}
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
    print(f"\n{arguments.out}")


def measured(title, module, arguments):
    """Measure all sides on a network in interleaved rounds."""
    from dataclasses import replace
    from itertools import islice

    import torch

    from examples.fashion_mnist.task import task as fashion
    from penjing import distill
    from penjing.train.finetune import Finetune
    from penjing.train.precision import bf16_pays

    whole, device = fashion(), arguments.device
    batches = list(islice(whole.train, BATCHES))
    task = replace(whole, train=batches)

    def plain(clock):
        return Finetune(steps=arguments.steps, learning_rate=RATE, warmup=0.0, distill=(), hooks=(clock,))

    with tempfile.TemporaryDirectory() as folder:
        stored = distill.TeacherCache(folder, module)
        with torch.no_grad():
            answers = stored.opened(task)
            for x, _ in batches:
                answers(x)

        def taught(clock):
            return replace(plain(clock), distill=distill.Logits(), teacher=stored)

        def alone(bf16):
            return lambda: bare(copy.deepcopy(module), batches, arguments.steps, device, bf16)

        sides = {"bare": alone(bf16_pays(device))}
        if bf16_pays(device):
            sides["bare, 32 bits"] = alone(False)
        sides["Finetune"] = lambda: penjing(copy.deepcopy(module), task, device, plain)
        sides["stored teacher"] = lambda: penjing(copy.deepcopy(module), task, device, taught)
        seconds = {name: [] for name in sides}
        for turn in range(-1, arguments.rounds):  # the first turn warms up
            for name in list(sides) if turn % 2 else list(reversed(sides)):
                elapsed = sides[name]()
                if turn >= 0:
                    seconds[name].append(elapsed)
    rows = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["bare"], strict=True)]
        row = rows[name] = {
            "ms_a_step": 1000 * statistics.median(values) / arguments.steps,
            "of_bare": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
        }  # fmt: skip
        print(f"{title}, {name:<16}{row['ms_a_step']:>9.1f} ms a step  {row['of_bare']:.3f} of bare "
              f"({row['lowest']:.3f} to {row['highest']:.3f})", flush=True)  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
