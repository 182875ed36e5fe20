"""MiniLM pruned to half of its multiply-accumulates (attention heads and neurons), compared with Torch-Pruning.

The sentence encoder all-MiniLM-L6-v2 with a linear layer on its mean embedding, trained on 20 Newsgroups. Both sides
start from the same trained network, prune once to the same fraction without changing the residual width, and fine-tune
in the same loop: the same texts in the same order, labels alone, the same optimizer, learning rate and steps.

Settings are selected for each side: each candidate is pruned and trained on `--select-texts` texts, and the one with
the best accuracy on held-out training texts is trained on `--texts` texts with every seed. The test texts are read once
per seed.

Penjing: `prune.Channels(macs=0.5, reconstruct=False)` with several criteria and scopes. Torch-Pruning: `BasePruner`
with `num_heads`, `prune_num_heads` and the residual layers ignored, as its own example for BERT does; the target's part
of the heads, and the ratio of the neurons by bisection, with several of its importances, global and local.

Speed: ONNX and OpenVINO files of the full and pruned networks, batch 1 and 16, 128 tokens, in interleaved rounds.

    python benchmarks/minilm_pruning.py [--target 0.5] [--seeds 0 1 2] [--texts 4000] [--select-texts 1000]
        [--train-texts 6000] [--judged 7528] [--parts accuracy speed]

The full classifier is trained first and cached. Every finished run is written immediately; a second call resumes where
the first stopped.
"""

import argparse
import copy
import importlib.metadata
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
BATCHES = (1, 16)
TOKENS = 128
TRAIN_BATCH = 32
HELD_OUT = 800
RATE = 2e-4
ROUND_TO = 8
HEADS = 12
PENJING = ("taylor global", "taylor layer", "jacobian global", "taylor sensitivity")
TORCH_PRUNING = ("taylor global", "taylor local", "l2 global", "l2 local")


class Batches:
    """(inputs, class) batches of tokenized texts, reshuffled on every pass."""

    def __init__(self, ids, mask, classes):
        self.ids, self.mask, self.classes = ids, mask, classes

    def __len__(self):
        return len(self.ids) // TRAIN_BATCH

    def __iter__(self):
        import torch

        order = torch.randperm(len(self.ids))
        for rows in order[: len(self) * TRAIN_BATCH].split(TRAIN_BATCH):
            yield {"input_ids": self.ids[rows], "attention_mask": self.mask[rows]}, self.classes[rows]


def classifier(classes):
    """Tokens to logits: the encoder, the mean over unmasked tokens, a linear layer."""
    import torch
    from transformers import AutoModel

    from examples import data

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = AutoModel.from_pretrained(data.minilm(), add_pooling_layer=False)
            self.classifier = torch.nn.Linear(self.model.config.hidden_size, classes)

        def forward(self, input_ids, attention_mask):
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weights = attention_mask[..., None].to(hidden.dtype)
            return self.classifier((hidden * weights).sum(1) / weights.sum(1))

    return Classifier().eval()


def prepared(judged):
    """The task with all training texts but the held-out ones, and the number of classes."""
    import torch

    from benchmarks.minilm_int8 import tokens
    from examples import data
    from penjing.tasks.task import Task

    newsgroups = data.texts("20newsgroups")
    names = sorted(set(newsgroups["train"][1]))

    def tokenized(part):
        (rows,) = tokens(newsgroups[part][0], batch=len(newsgroups[part][0]))
        return rows["input_ids"], rows["attention_mask"], torch.tensor([names.index(c) for c in newsgroups[part][1]])

    ids, mask, classes = tokenized("train")
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    test = tokenized("test")
    chosen = torch.arange(0, len(test[0]), max(1, len(test[0]) // judged))[:judged]

    def judge(ids, mask, classes):
        def accuracy(predict):
            right = 0
            for at in range(0, len(ids), 16):
                rows = slice(at, at + 16)
                logits = predict(input_ids=ids[rows].numpy(), attention_mask=mask[rows].numpy())
                right += int((logits.argmax(1) == classes[rows].numpy()).sum())
            return right / len(ids)

        return accuracy

    calibration = [{"input_ids": ids[r], "attention_mask": mask[r]} for r in rest[:256].split(16)]
    return Task(
        example={k: v[:2] for k, v in calibration[0].items()},
        calibration=calibration,
        train=Batches(ids[rest], mask[rest], classes[rest]),
        select=judge(ids[held], mask[held], classes[held]),
        evaluate=judge(*(part[chosen] for part in test)),
        loss=torch.nn.functional.cross_entropy,
        dynamic={k: {0: "batch", 1: "length"} for k in ("input_ids", "attention_mask")},
    ), len(names)  # fmt: skip


def shown(label):
    """Print training progress every half minute."""
    last = [time.monotonic()]

    def show(kind, **values):
        if kind == "progress" and "loss" in values and time.monotonic() - last[0] > 30:
            last[0] = time.monotonic()
            print(f"  {label}: {values['done']}/{values['total']}  loss {values['loss']:.4f}", flush=True)

    return show


def trained(network, task, seed, texts, label, folder=None):
    """Train the network with AdamW on a number of texts."""
    from penjing.steps.step import Context
    from penjing.train.finetune import Finetune, train

    settings = Finetune(
        epochs=texts / TRAIN_BATCH / len(task.train), learning_rate=RATE, optimizer="adamw", weight_decay=0.01
    )
    return train(network, Context(task=task, seed=seed, folder=folder, events=shown(label)), settings)


def source(task, classes, texts):
    """The full classifier, trained once and cached."""
    from safetensors.torch import load_file, save_file

    from examples.data import cache
    from penjing.randomness import seed_everything

    path = cache() / f"minilm-20newsgroups-{texts}.safetensors"
    seed_everything(0)
    network = classifier(classes)
    if not path.exists():
        state = cache() / f"{path.stem}-training"
        state.mkdir(exist_ok=True)
        trained(network, task, 0, texts, "training the whole classifier", state)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
    network.load_state_dict(load_file(path))
    return network.eval()


def penjing(settings, module, task, target, seed):
    """Prune with `prune.Channels`; return the captured network."""
    from penjing.network.capture import capture_network
    from penjing.prune import Channels
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    criterion, scope = settings.split()
    raised = capture_network(module, *task.call(), task.dynamic)
    step = Channels(macs=target, criterion=criterion, scope=scope, round_to=ROUND_TO, batches=10, reconstruct=False)
    return step(Draft(raised), Context(task=task, source=raised, seed=seed)).network


def torch_pruning(settings, module, task, target, seed):
    """Prune with Torch-Pruning; return the module."""
    import torch_pruning as tp

    from penjing.randomness import seed_everything

    word, scope = settings.split()
    seed_everything(seed)
    if word == "taylor":
        for _, (x, y) in zip(range(10), task.train, strict=False):
            task.loss(module(**x), y).backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad(set_to_none=True)

    def pruned(ratio):
        model = copy.deepcopy(module)
        for name, parameter in model.named_parameters():
            parameter.grad = None if gradients[name] is None else gradients[name].clone()
        importance = {"taylor": tp.importance.GroupTaylorImportance, "l2": tp.importance.GroupMagnitudeImportance}[word]
        layers = model.model.encoder.layer
        attentions = [layer.attention.self for layer in layers]
        tp.pruner.BasePruner(
            model,
            task.example,
            importance=importance(),
            global_pruning=scope == "global",
            pruning_ratio=ratio,
            max_pruning_ratio=0.9,  # like Penjing's `min_keep`: a tenth of every group is kept
            num_heads={part: HEADS for own in attentions for part in (own.query, own.key, own.value)},
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=1 - target,
            ignored_layers=[
                model.model.embeddings,
                *(part for layer in layers for part in (layer.attention.output.dense, layer.output.dense)),
                model.classifier,
            ],
            round_to=ROUND_TO,
            output_transform=lambda out: out.sum(),
        ).step()
        model.zero_grad()
        return model

    whole, low, high = macs(module, task), 0.0, 0.9
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if macs(pruned(middle), task) <= target * whole else (middle, high)
    return pruned(high)


def macs(network, task):
    """Multiply-accumulates of one text."""
    from penjing.analyze.cost import cost, totals
    from penjing.network.capture import capture_network

    return totals(cost(capture_network(network, *task.call()), task.call())).macs


SIDES = {"penjing": (penjing, PENJING), "torch-pruning": (torch_pruning, TORCH_PRUNING)}


def accuracies(arguments, module, task, data, save):
    """Select the settings of both sides, train them, and record the test accuracy."""
    from penjing.tasks.outputs import numpy_predictor

    target = arguments.target
    if "source" not in data:
        data["source"] = {"accuracy": task.evaluate(numpy_predictor(module)), "macs": macs(module, task)}
        save()
    print(f"whole {data['source']['accuracy']:.4f}", flush=True)

    def ran(side, settings, texts, seed, judge):
        key = f"macs {target:g} {side} {settings} texts {texts} seed {seed} {judge}"
        if key not in data["runs"]:
            start = time.perf_counter()
            network = SIDES[side][0](settings, module, task, target, seed)
            pruned_s, share = time.perf_counter() - start, macs(network, task) / data["source"]["macs"]
            network = trained(network, task, seed, texts, key)
            accuracy = getattr(task, judge)(numpy_predictor(network.eval()))
            seconds = time.perf_counter() - start
            data["runs"][key] = {"accuracy": accuracy, "macs": share, "prune_s": pruned_s, "seconds": seconds}
            save()
        row = data["runs"][key]
        print(f"{key:<84}{row['accuracy']:>8.4f}{row['macs']:>8.1%}{row['seconds']:>7.0f} s", flush=True)
        return row

    for side, (_, every) in SIDES.items():
        chosen = max(every, key=lambda s: ran(side, s, arguments.select_texts, 0, "select")["accuracy"])
        rows = [ran(side, chosen, arguments.texts, seed, "evaluate") for seed in arguments.seeds]
        values = [row["accuracy"] for row in rows]
        data["accuracy"][side] = {
            "settings": chosen,
            "texts": arguments.texts,
            "accuracy": statistics.median(values),
            "mean": statistics.mean(values),
            "lowest": min(values),
            "highest": max(values),
            "macs": max(row["macs"] for row in rows),
        }
        save()


def speeds(arguments, module, task, data, save):
    """Time full and pruned networks in the runtimes in interleaved rounds."""
    from penjing.measure import Target, compare
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.steps.draft import Draft

    whole = macs(module, task)
    with tempfile.TemporaryDirectory() as aside:
        targets, shares = [], {}
        for label, (prune, every) in {"whole": (None, ()), **SIDES}.items():
            settings = data["accuracy"].get(label, {}).get("settings", every[0] if every else "")
            network = prune(settings, module, task, arguments.target, 0) if prune else module
            shares[label] = macs(network, task) / whole
            raised = capture_network(network, *task.call(), task.dynamic)
            for runtime in ("onnxruntime", "openvino"):
                folder = Path(aside) / f"{label} {runtime}"
                folder.mkdir()
                building.build(Draft(raised), runtime, "fp32", task, {"kind": "tensor"}, folder)
                for batch in BATCHES:
                    call = {k: v[:batch].numpy() for k, v in task.calibration[0].items()}
                    inputs = [call["input_ids"], call["attention_mask"]]
                    targets.append(Target(f"{folder.name}, batch {batch}", folder, inputs, batch))
        timings = compare(targets, threads=THREADS, seconds=arguments.seconds)
    data["speed"] = {}
    for target in targets:
        label = target.name.split()[0]
        latency, before = timings[target.name].latency, timings[target.name.replace(label, "whole", 1)].latency
        data["speed"][target.name] = {
            "median_ms": latency.median, "spread": latency.spread, "macs": shares[label],
            "speedup": before.median / latency.median,
        }  # fmt: skip
        print(f"{target.name:<40}{latency.median:>9.2f} ms  spread {latency.spread:>4.0%}", end="")
        print(f"  macs {shares[label]:>6.1%}  {before.median / latency.median:.2f}x", flush=True)
    save()


def main() -> None:
    """Run all that is missing, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--select-texts", type=int, default=1000)
    parser.add_argument("--train-texts", type=int, default=6000)
    parser.add_argument("--judged", type=int, default=7528, help="at most so many texts of the test part")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--parts", nargs="+", default=["accuracy", "speed"], choices=["accuracy", "speed"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/minilm_pruning.json")
    arguments = parser.parse_args()
    import torch

    from penjing import measure

    torch.set_num_threads(THREADS)
    data = {"machine": vars(measure.machine(THREADS)), "versions": measure.versions(), "runs": {}, "accuracy": {}}
    for package in ("torch-pruning", "transformers"):
        data["versions"][package] = importlib.metadata.version(package)
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text())
        data |= {k: v for k, v in earlier.items() if k not in ("machine", "versions")}

    def save():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")

    task, classes = prepared(arguments.judged)
    module = source(task, classes, arguments.train_texts)
    for part in arguments.parts:
        {"accuracy": accuracies, "speed": speeds}[part](arguments, module, task, data, save)
    print(f"\nwhole {data.get('source', {}).get('accuracy', float('nan')):.4f}")
    for side, row in data["accuracy"].items():
        print(f"  {side:<15}{row['settings']:<20}{row['accuracy']:>8.4f} "
              f"({row['lowest']:.4f} to {row['highest']:.4f}), macs {row['macs']:.1%}")  # fmt: skip
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
