"""The joint recipe against a chain of separate tools: pruning, distillation and quantization of ResNet-20.

Fashion-MNIST. Both sides start from the same trained network and train for the same total number of epochs.

`joint`: `penjing.recipes.joint`, exported for OpenVINO. `chain`: Torch-Pruning with its best settings from
`pruning_accuracy.py`, plain fine-tuning on labels in the same loop at the same learning rate, then NNCF's `quantize`
with its default preset on the same calibration images, in OpenVINO.

Accuracy is that of the INT8 file in its runtime, on the test images, for every seed. Latency: the files of the first
seed, the unpruned network in fp32 in both runtimes and in torch, at batch 1 and 32, in interleaved rounds. Every chain
is compared with the fastest joint file whose median accuracy is at least the chain's.

`limit`: a single image in a third of fp32's time. Blocks are removed, or a student with few, wide layers (`resnet8`,
random initialization) is distilled from the network for `--limit-epochs`, in ONNX Runtime with one thread and with two.
Training runs on `--device`; the networks of `--limit` are built for all `--seeds` but not timed, so that another
machine can build them.

    python benchmarks/joint.py [--epochs 2] [--seeds 0 1 2] [--sides joint chain] [--parts accuracy speed limit]

Every finished run is written immediately, and its file is cached; a second call resumes where the first stopped, and
`limit` uses every seed it finds in the cache.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
RESULTS = ROOT / "benchmarks" / "results"
THREADS = 2
RATE = 0.05
JOINT = {
    "joint 3 blocks less": {"blocks": 3},
    "joint 3 blocks less, macs 0.6": {"blocks": 3, "macs": 0.6},
    "joint 3 blocks less, macs 0.4": {"blocks": 3, "macs": 0.4},
    "joint 3 blocks less, macs 0.3": {"blocks": 3, "macs": 0.3},
    "joint macs 0.5": {"macs": 0.5},
    "joint macs 0.25": {"macs": 0.25},
}
LIMIT = {f"joint {n} blocks less": {"blocks": n} for n in (4, 5)}
WIDTH = 32  # of the student's first stage
STUDENT = f"student of {WIDTH}, {2 * WIDTH} and {4 * WIDTH} channels"
CHAIN = {"chain macs 0.5": 0.5, "chain macs 0.25": 0.25}


def joint(settings, module, task, seed, epochs, folder):
    """Run the joint recipe and write the OpenVINO file."""
    from penjing import recipes

    ran(recipes.joint(**settings, epochs=epochs, learning_rate=RATE), module, task, seed, folder, "openvino")


def student(epochs):
    """Distil a student with few, wide layers from the source."""
    from penjing import Clip, Finetune, Recipe, distill, quantize

    looks = distill.AttentionTransfer(features=(("stages.0", "stages.1"), ("stages.1", "stages.2")), weight=5.0)
    return Recipe(
        distill.Student(architecture="resnet8", settings={"width": WIDTH}),
        Finetune(epochs=0.8 * epochs, learning_rate=0.1, clip=Clip(), distill=(distill.Logits(), looks)),
        quantize.Static(),
        quantize.QAT(finetune=Finetune(epochs=0.2 * epochs, learning_rate=0.005, weight_decay=1e-4)),
    )


def ran(recipe, module, task, seed, folder, runtime, device="cpu"):
    """Run a recipe and write the file for a runtime."""
    from pruning_accuracy import shown

    from penjing import measure, runtimes
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.randomness import seed_everything
    from penjing.steps.draft import Draft
    from penjing.steps.step import Context

    seed_everything(seed)
    raised = capture_network(module, *task.call(), task.dynamic)
    capabilities = runtimes.get(runtime).capabilities(measure.machine(THREADS).instruction_sets)
    context = Context(
        task=task, source=raised, seed=seed, device=device, capabilities=capabilities, events=shown(folder.name)
    )
    draft = Draft(raised)
    for step in recipe:
        draft = step(draft, context)
    building.build(draft, runtime, "int8", task, {"kind": "tensor"}, folder)


def chain(target, module, task, seed, epochs, folder):
    """Torch-Pruning, fine-tuning, NNCF."""
    import pruning_accuracy
    import ptq_cost
    import torch

    best = json.loads((RESULTS / "pruning_accuracy.json").read_text())["networks"]["resnet20"]["accuracy"]
    settings = best[f"{target:g}"]["torch-pruning"]["settings"]
    pruned = pruning_accuracy.torch_pruning(settings, "resnet20", module, task, target, seed)
    trained = pruning_accuracy.finetuned(pruned, "resnet20", task, seed, epochs, folder.name).eval()
    path, batch = folder / "fp32.onnx", torch.export.Dim("batch", min=1, max=4096)
    torch.onnx.export(trained, (task.example,), str(path), dynamo=True, dynamic_shapes=({0: batch},),
                      input_names=["x"], output_names=["output"], verbose=False, external_data=False)  # fmt: skip
    import openvino

    ptq_cost._nncf(openvino.convert_model(str(path)), torch.cat(list(task.calibration)), folder)


def opened(folder, threads=THREADS):
    """What the latency workers call."""
    import ptq_cost

    folder = Path(folder)
    return ptq_cost.opened("nncf" if folder.name.startswith("chain") else "penjing", folder, threads)


def accuracies(arguments, data, save):
    """Build every file, and evaluate it on the test images."""
    from examples.data import cache
    from examples.fashion_mnist.network import resnet20
    from examples.fashion_mnist.task import task as fashion
    from penjing.tasks.outputs import numpy_predictor

    task, module = fashion(), resnet20()
    data["versions"] = versions("torch-pruning", "nncf")
    data.setdefault("source", {"accuracy": task.evaluate(numpy_predictor(module))})
    sides = {"joint": (joint, JOINT), "chain": (chain, CHAIN)}
    for seed in arguments.seeds:
        for side in arguments.sides:
            make, every = sides[side]
            for name, settings in every.items():
                key = f"{name} epochs {arguments.epochs:g} seed {seed}"
                folder = cache() / "joint" / key
                if key not in data["runs"]:
                    start = time.perf_counter()
                    folder.mkdir(parents=True, exist_ok=True)
                    make(settings, resnet20(), task, seed, arguments.epochs, folder)
                    session = opened(folder)
                    accuracy = task.evaluate(lambda x, session=session: session.run([x])[0])
                    data["runs"][key] = {"accuracy": accuracy, "seconds": time.perf_counter() - start}
                    save()
                print(
                    f"{key:<60}{data['runs'][key]['accuracy']:>8.4f}{data['runs'][key]['seconds']:>7.0f} s", flush=True
                )
    data["accuracy"] = {}
    for name in (*JOINT, *CHAIN):
        values = [
            row["accuracy"]
            for key, row in data["runs"].items()
            if key.startswith(f"{name} epochs {arguments.epochs:g} ")
        ]
        if values:
            data["accuracy"][name] = {
                "accuracy": statistics.median(values), "lowest": min(values), "highest": max(values),
                "seeds": len(values), "epochs": arguments.epochs,
            }  # fmt: skip
    save()


def speeds(arguments, data, save):
    """Time every file of the first seed and the unpruned network in interleaved rounds."""
    import tempfile

    import torch

    from examples.data import cache
    from examples.fashion_mnist.task import task as fashion
    from penjing import measure
    from penjing.tasks.outputs import to_numpy

    task = fashion()
    images = to_numpy(torch.cat(list(task.calibration)))
    with tempfile.TemporaryDirectory() as aside:
        folders = whole(Path(aside), task)
        for name in data["accuracy"]:
            folders[name] = cache() / "joint" / f"{name} epochs {arguments.epochs:g} seed {arguments.seeds[0]}"
        data["speed"] = timed(folders, images, arguments.seconds)
    data["machine"], data["wins"] = vars(measure.machine(THREADS)), wins(data)
    save()


def limit(arguments, data, save):
    """Accuracy and single-image latency of shallow networks, next to the full network in every runtime."""
    import tempfile

    import torch

    from examples.data import cache
    from examples.fashion_mnist.network import resnet20
    from examples.fashion_mnist.task import task as fashion
    from penjing import measure, recipes
    from penjing.tasks.outputs import numpy_predictor, to_numpy

    task, epochs = fashion(), arguments.limit_epochs
    data["limit"] = {"accuracy": {}, "epochs": epochs, "source": task.evaluate(numpy_predictor(resnet20()))}
    every = {n: recipes.joint(**s, epochs=epochs, learning_rate=RATE) for n, s in LIMIT.items()}
    every[STUDENT] = student(epochs)
    folders = {}
    for name in arguments.limit or every:
        scores, trainings = [], []
        for seed in arguments.seeds:
            folder = cache() / "joint" / f"{name} onnxruntime epochs {epochs:g} seed {seed}"
            about = folder.with_name(f"{folder.name}.json")
            if not about.exists():
                if scores and not arguments.limit:
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                start = time.perf_counter()
                ran(every[name], resnet20(), task, seed, folder, "onnxruntime", arguments.device)
                about.write_text(json.dumps({"seconds": time.perf_counter() - start, **where(arguments.device)}))
            folders.setdefault(name, folder)
            session = opened(folder)
            scores.append(task.evaluate(lambda x, session=session: session.run([x])[0]))
            trainings.append(json.loads(about.read_text()))
            print(f"{folder.name:<70}{scores[-1]:>8.4f}{trainings[-1]['seconds']:>7.0f} s", flush=True)
        data["limit"]["accuracy"][name] = {
            "accuracy": statistics.median(scores), "lowest": min(scores), "highest": max(scores), "seeds": len(scores),
            "made": trainings,
        }  # fmt: skip
        save()
    if arguments.limit:  # the rest is built by another process
        return
    with tempfile.TemporaryDirectory() as aside:
        folders |= whole(Path(aside), task)
        images = to_numpy(torch.cat(list(task.calibration)))
        data["limit"]["speed"] = timed(folders, images, arguments.seconds)
    data["limit"]["measured on"] = {"machine": vars(measure.machine(THREADS)), "versions": versions()}
    save()


def where(device):
    """The device that a network is trained on."""
    import torch

    cuda = torch.device(device).type == "cuda"
    return {"device": torch.cuda.get_device_name(device) if cuda else "the processor", "torch": torch.__version__}


def versions(*others):
    """Versions of Penjing, its dependencies and other packages."""
    from penjing import measure

    return measure.versions() | {name: importlib.metadata.version(name) for name in others}


def timed(folders, images, seconds):
    """Time all files in interleaved rounds: a single image with one thread and with two, and a large batch."""
    from penjing.measure import Target, compare

    latencies = {}
    for batch, threads in ((1, 1), (1, THREADS), (32, THREADS)):
        targets = [Target(name, folder, [images[:batch]], batch) for name, folder in folders.items()]
        timings = compare(targets, threads=threads, seconds=seconds, opener="joint:opened")
        key = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
        rows = latencies[key] = {name: vars(timings[name].latency) for name in folders}
        fastest = min(row["median"] for name, row in rows.items() if name.startswith("fp32"))
        for name, row in rows.items():
            print(f"{key} {name:<40}{row['median']:>9.3f} ms  spread {row['spread']:>4.0%}  "
                  f"{fastest / row['median']:.2f}x", flush=True)  # fmt: skip
    return latencies


def whole(aside, task):
    """The whole network in fp32, a folder for every runtime."""
    from examples.fashion_mnist.network import resnet20
    from penjing.network.capture import capture_network
    from penjing.pipeline import building
    from penjing.steps.draft import Draft

    folders = {}
    raised = capture_network(resnet20(), *task.call(), task.dynamic)
    for runtime in ("openvino", "onnxruntime", "torch"):
        folders[f"fp32 {runtime}"] = folder = aside / f"fp32 {runtime}"
        folder.mkdir()
        building.build(Draft(raised), runtime, "fp32", task, {"kind": "tensor"}, folder)
    return folders


def wins(data):
    """For every chain, the fastest joint file that is at least as accurate, and its speed-up."""
    speedups = {}
    for case, rows in data["speed"].items():
        for name in (n for n in CHAIN if n in data["accuracy"]):
            needed = data["accuracy"][name]["accuracy"]
            able = [n for n in JOINT if n in data["accuracy"] and data["accuracy"][n]["accuracy"] >= needed]
            if able:
                best = min(able, key=lambda n: rows[n]["median"])
                times = rows[name]["median"] / rows[best]["median"]
                speedups[f"{name}, {case}"] = {"by": best, "times": times}
                print(f"{case} {name}: {best} is as accurate and {times:.2f}x faster")
    return speedups


def main() -> None:
    """Run all that is missing, print the tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sides", nargs="+", default=["joint", "chain"], choices=["joint", "chain"])
    parser.add_argument("--parts", nargs="+", default=["accuracy", "speed", "limit"],
                        choices=["accuracy", "speed", "limit"])  # fmt: skip
    parser.add_argument("--limit-epochs", type=float, default=30.0)
    parser.add_argument("--limit", nargs="+", choices=[*LIMIT, STUDENT], help="make these files, and time nothing")
    parser.add_argument("--device", default="cpu", help="where the networks of `limit` are trained")
    parser.add_argument("--threads", type=int, default=THREADS, help="of the trainings")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "joint.json")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    os.environ["PYTHONPATH"] = os.pathsep.join(  # for the processes that time
        [str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    data = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": {}}

    def save():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")

    for part in arguments.parts:
        {"accuracy": accuracies, "speed": speeds, "limit": limit}[part](arguments, data, save)
    if "source" in data:
        print(f"\nsource {data['source']['accuracy']:.4f}")
    for name, row in data.get("accuracy", {}).items():
        print(f"{name:<40}{row['accuracy']:>8.4f} ({row['lowest']:.4f} to {row['highest']:.4f})")
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
