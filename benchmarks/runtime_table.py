"""Every runtime on every network, in fp32 and INT8: one table of latency, size and parity.

ResNet-18 and -50, MobileNetV2 and V3 (random weights and statistics of batch norm as after training),
EfficientNet-Lite0 (trained on ImageNet) and MiniLM (trained; 32 tokens). INT8 is `quantize.Static` for the runtime's
own formats, its ranges from 64 samples; MiniLM, whose outlier channels cost most of the signal otherwise, takes
`Static(outliers="mitigate")`, which is what `compress` does without a recipe. A cell is an artifact that was built,
compared with the torch network of the same plan in its own runtime (worst output and batch, with the limit that it has
to reach) and timed, or the reason why it is refused. Latency: batch 1, all artifacts of a network in turns, each in a
process of its own.

    python benchmarks/runtime_table.py [--networks NAME ...] [--runtimes NAME ...] [--seconds 2] [--folder DIR]

With --auto: which runtime ``--runtime auto`` picks, how its fp32 compares with the fastest of those considered, and the
seconds that picking and one export take.

What is already in --folder is not built again. TVM tunes for PENJING_TVM_SECONDS.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
THREADS = 2
SAMPLES = 64
TOKENS = 32
NETWORKS = ("lite0", "resnet18", "mobilenet_v2", "mobilenet_v3_large", "minilm", "resnet50")
PRECISIONS = ("fp32", "int8")
OUTLIERS = {"minilm": "mitigate"}  # network → what `Static` does about outlier channels


def network_and_task(name: str):
    """The network in eval mode, and its task."""
    import torch

    from penjing import Task

    torch.manual_seed(0)
    if name == "lite0":
        from examples.imagenet_lite0.network import lite0
        from examples.imagenet_lite0.task import task

        whole = task()
        images = torch.cat(list(whole.calibration))[:SAMPLES]
        return lite0().eval(), Task(example=images[:1], calibration=list(images.split(16)))
    if name == "minilm":
        from benchmarks import minilm_int8
        from examples.embeddings.task import task

        minilm_int8.TOKENS = TOKENS
        samples = [batch for batch in task().calibration][: SAMPLES // 8]
        cut = [{k: _cut(v) for k, v in sample.items()} for sample in samples]
        names = tuple(cut[0])
        example = {k: v[:1] for k, v in cut[0].items()}
        return minilm_int8.encoder(), Task(
            example=example, calibration=cut, dynamic={word: {0: "batch"} for word in names}
        )
    from penjing import architectures

    network = architectures.build(name)
    for module in network.modules():  # as after training, so that ranges are not degenerate
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    images = torch.randn(SAMPLES, 3, 224, 224)
    return network.eval(), Task(example=images[:1], calibration=list(images.split(16)))


def _cut(tensor):
    """Exactly TOKENS tokens of each text, padded with zeros."""
    import torch

    tensor = torch.as_tensor(tensor)
    return torch.nn.functional.pad(tensor[:, :TOKENS], (0, max(0, TOKENS - tensor.shape[1]))).contiguous()


def cell(name: str, runtime: str, folder: Path) -> None:
    """Build the artifacts of a network for a runtime, and write `cell.json` beside each."""
    import torch

    from penjing import measure, runtimes
    from penjing.errors import PenjingError
    from penjing.network.capture import capture_network
    from penjing.pipeline import building, evidence
    from penjing.quantize import Static
    from penjing.records import to_json
    from penjing.runtimes import isolated
    from penjing.steps.draft import Draft
    from penjing.steps.plan import Plan
    from penjing.steps.step import Context
    from penjing.surgery import insert
    from penjing.tasks.outputs import flatten_outputs

    torch.set_num_threads(THREADS)
    network, task = network_and_task(name)
    with torch.no_grad():
        args, kwargs = task.call()
        structure = flatten_outputs(network(*args, **kwargs))[1]
    captured = capture_network(network, args, kwargs, task.dynamic)
    capabilities = runtimes.get(runtime).capabilities(measure.machine(THREADS).instruction_sets)
    for precision in PRECISIONS:
        place = folder / precision
        if (place / "cell.json").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        row = {}
        start = time.perf_counter()
        try:
            if precision not in capabilities.precisions:
                notes = "; ".join(n for n in capabilities.notes if "INT8" in n or "simulation" in n)
                raise PenjingError(notes or f"{runtime} has no {precision} here", code="precision")
            draft = Draft(captured)
            if precision == "int8":
                context = Context(task=task, capabilities=capabilities, source=captured, events=lambda *a, **k: None)
                draft = Static(outliers=OUTLIERS.get(name, "keep"))(draft, context)
                building.check_integers(name, draft.plan)
            manifest = building.build(draft, runtime, precision, task, structure, place)
            row["seconds"] = time.perf_counter() - start
            session = isolated.open_artifact(place, THREADS)
            call = evidence.one_call(task, evidence.SAMPLES)
            with torch.no_grad():
                original = [t.numpy() for t in flatten_outputs(network(*call[0], **call[1]))[0]]
            answers = session.run(evidence.arrays(manifest, call))
            plan = draft.plan if precision == "int8" else Plan()
            planned = insert(draft.network, plan)
            near, far = evidence.compared(original, task, session, answers, planned, captured, manifest)
            rows, integer, floating = building.executed_rows(captured, plan, task.call(), manifest, place)
            row |= {"planned_db": near.least_db, "limit_db": near.worst.limit_db, "holds": near.worst.holds}
            row |= {"source_db": far.least_db, "agreement": far.agreement}
            row |= {"size_bytes": measure.size_bytes(place, manifest.files()), "integer": integer, "float": floating}
            row["float_macs_share"] = building.float_shares(rows)[0] if precision == "int8" else None
        except PenjingError as error:
            row = {"refused": " ".join(str(error).split())[:600], "code": error.code}
        (place / "cell.json").write_text(to_json(row))


def auto(name: str) -> dict:
    """What ``--runtime auto`` picks for a network, and how long that takes, next to one export."""
    from penjing.pipeline import building, picking
    from penjing.pipeline.compress import order_of
    from penjing.pipeline.prepare import prepare
    from penjing.records.folder import RunFolder
    from penjing.steps.draft import Draft

    network, task = network_and_task(name)
    order = order_of(network, task, "minimize latency_ms", runtime="auto", threads=THREADS)
    with tempfile.TemporaryDirectory() as aside:
        prepared = prepare(order, RunFolder(Path(aside) / "run"))
        start = time.perf_counter()
        (folder := Path(aside) / "export").mkdir()
        draft = Draft(prepared.run.network)
        building.build(draft, "onnxruntime", "fp32", prepared.run.task, prepared.structure, folder)
        export = time.perf_counter() - start
        start = time.perf_counter()
        (runtime,) = picking.picked(prepared)
        return {"picked": runtime, "export_s": export, "seconds": time.perf_counter() - start}


def timings(name: str, folder: Path, seconds: float) -> dict[str, dict]:
    """Latency of all artifacts of a network, in turns."""
    from penjing import measure
    from penjing.pipeline import evidence
    from penjing.records.manifest import read_manifest

    _, task = network_and_task(name)
    targets = []
    for place in sorted(folder.glob("*/*")):
        if (place / "cell.json").exists() and "refused" not in json.loads((place / "cell.json").read_text()):
            inputs = evidence.arrays(read_manifest(place), task.call())
            targets.append(measure.Target(f"{place.parent.name} {place.name}", place, inputs, 1))
    done = measure.compare(targets, threads=THREADS, seconds=seconds)
    return {key: {"median": t.latency.median, "spread": t.latency.spread, "load_ms": t.load_ms,
                  "peak_memory_bytes": t.peak_memory_bytes} for key, t in done.items()}  # fmt: skip


def main() -> None:
    """Build, measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--runtimes", nargs="+")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--auto", action="store_true", help="only what --runtime auto picks, and its time")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/runtime_table.json")
    arguments = parser.parse_args()
    if arguments.cell:
        cell(*arguments.cell, arguments.folder)
        return
    from penjing import measure, runtimes

    data = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"networks": {}}
    if arguments.auto:
        for name in arguments.networks:
            rows = data["networks"][name]["cells"]
            data["networks"][name]["auto"] = row = auto(name)
            timed = {key: cell["median"] for key, cell in rows.items() if "median" in cell}
            fp32 = {key.split()[0]: ms for key, ms in timed.items() if key.endswith(" fp32")}
            row["over_fastest"] = fp32[row["picked"]] / min(
                fp32[runtime] for runtime in runtimes.DEPLOYED if runtime in fp32
            )
            print(f"{name:<20}{row['picked']:<14}{row['seconds']:.1f} s (export {row['export_s']:.1f} s)", flush=True)
            arguments.out.write_text(json.dumps(data, indent=1, default=str) + "\n")
        return
    names = arguments.runtimes or [n for n in runtimes.names() if runtimes.installed(n)]
    with tempfile.TemporaryDirectory() as aside:
        base = arguments.folder or Path(aside)
        for name in arguments.networks:
            for runtime in names:
                place = base / name / runtime
                command = [sys.executable, __file__, "--cell", name, runtime, "--folder", str(place)]
                if not all((place / p / "cell.json").exists() for p in PRECISIONS):
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode:
                        print(f"{name} {runtime}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            times = timings(name, base / name, arguments.seconds)
            rows = {}
            for place in sorted((base / name).glob("*/*")):
                if (place / "cell.json").exists():
                    key = f"{place.parent.name} {place.name}"
                    rows[key] = json.loads((place / "cell.json").read_text()) | times.get(key, {})
            data["networks"][name] = {
                **data["networks"].get(name, {}),
                "cells": rows,
                "machine": vars(measure.machine(THREADS)),
                "versions": measure.versions(),
            }
            _print(name, rows)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(data, indent=1, default=str) + "\n")


def _print(name: str, rows: dict[str, dict]) -> None:
    print(f"\n{name}\n{'':<22}{'ms':>9}{'spread':>8}{'MB':>8}{'planned':>9}{'source':>8}{'float':>7}")
    for key, row in sorted(rows.items(), key=lambda item: item[1].get("median", 1e9)):
        if "refused" in row:
            print(f"{key:<22} refused: {row['refused'][:110]}")
            continue
        share = row["float_macs_share"]
        figures = (
            f"{row.get('median', float('nan')):>9.2f}{row.get('spread', 0):>8.0%}{row['size_bytes'] / 1e6:>8.2f}",
            f"{row['planned_db']:>9.1f}{row['source_db']:>8.1f}{'' if share is None else f'{share:.0%}':>7}",
            "" if row["holds"] else "  below its limit",
        )
        print(
            f"{key:<22}{''.join(figures)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
