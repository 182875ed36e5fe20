"""The search against Optuna's samplers over the same space, how well it predicts, and what it resumes to.

    python benchmarks/search.py [--parts goal hypervolume resume cluster headline] [--network digits|resnet20]
        [--folder DIR]

`goal`: trials that train (full evaluations) until an artifact meets a goal that the integers of the whole network do
not, by the search and by Optuna's TPE and NSGA-II from scratch, several seeds; all trials count that a method begins.
`hypervolume`: of metric and packed size (and latency) after the same wall time, by the search, NSGA-II and random
choices, against the source's figures as the reference point. `resume`: the process is killed at random moments, again
and again, and resumed; the artifact's hash is compared with that of a search that nobody disturbed. `cluster`: trials
per minute with one and with two processes of a local Ray cluster, single-threaded. `headline`: ``penjing compress``
on ResNet-20 within --minutes: the fewest packed bytes with a drop of at most 0.5 points that are ten times faster than
torch and 1.3 times faster than NNCF's INT8 in OpenVINO; both are timed before, for the goal, and beside it after.

What is in --folder already is not run again.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
GOALS = {
    "digits": "packed_bytes<=10KB, drop<=1%, minimize packed_bytes",
    "resnet20": "packed_bytes<=80KB, drop<=0.5%, minimize packed_bytes",
}
MOST = 20  # trials of a method until it gives up
KILLS = 20
OPTIONS = {"runtime": "onnxruntime", "threads": 1, "seconds": 0.3}


def source(name: str):
    """The network and its task."""
    if name == "digits":
        from examples.digits.network import trained
        from examples.digits.task import task

        return trained(), task()
    from examples.fashion_mnist.network import resnet20
    from examples.fashion_mnist.task import task

    return resnet20(), task()


def prepared_search(name: str, goal: str, seed: int, folder: Path, budget):
    """A search that has everything but its first trial."""
    from dataclasses import replace

    from penjing.pipeline.compress import order_of
    from penjing.pipeline.prepare import prepare
    from penjing.recipes.recipe import Recipe
    from penjing.records.folder import RunFolder
    from penjing.search.budget import Clock
    from penjing.search.search import Search
    from penjing.search.workers import Here

    order = replace(order_of(*source(name), goal, seed=seed, **OPTIONS), recipe=Recipe(), searches=True)
    prepared = prepare(order, RunFolder(folder, resume=folder.exists()))
    clock = Clock(budget.minutes)
    return Search(prepared, budget, clock, Here(prepared, clock))


class Reached(BaseException):
    """An artifact meets the goal."""


def until_goal(name: str, goal: str, method: str, seed: int, folder: Path) -> dict:
    """Trials until one meets the goal."""
    from penjing.search.search import Budget

    counted = {"trials": 0, "trained": 0, "met": False}
    search = prepared_search(name, goal, seed, folder, Budget(trials=MOST))
    start = time.monotonic()

    def look(event):
        if event["kind"] == "tried":
            trained = next(t for t in search.history.trials if t.number == event["number"]).outcome.choice.epochs > 0
            counted["trials"] += 1
            counted["trained"] += trained
            if event["met"]:
                counted["met"] = True
                raise Reached

    search.events.listeners = (look,)
    try:
        search.run() if method == "penjing" else from_scratch(search, method, seed)
    except Reached:
        pass
    return counted | {"seconds": time.monotonic() - start}


def from_scratch(search, method: str, seed: int, seconds: float | None = None) -> None:
    """Trials that a sampler of Optuna proposes, or chance; nothing is known before."""
    import optuna

    from penjing.goals import judging as goals
    from penjing.search.budget import OutOfTime
    from penjing.search.choice import Choice

    samplers = optuna.samplers
    sampler = {
        "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=True),
        "nsga2": lambda: samplers.NSGAIISampler(seed=seed, population_size=8),
        "random": lambda: samplers.RandomSampler(seed=seed),
    }[method]()
    directions = search.study.study.directions
    study = optuna.create_study(directions=directions, sampler=sampler)
    start, tries = time.monotonic(), 0
    with contextlib.suppress(OutOfTime):
        while tries < MOST if seconds is None else time.monotonic() - start < seconds:
            trial = study.ask(search.study.distributions)
            choice = Choice(**(Choice().data() | trial.params))
            if choice.technique == "none":
                choice = Choice(**(choice.data() | {"keep": 1.0}))
            if not search.space.sensible(choice):
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                continue
            tries += 1
            number = search.study.begin(choice)
            search._begin(number, choice)
            search._took(search.workers.wait())
            best = search.history.best_of(next(t for t in search.history.trials if t.number == number))
            figures = goals.figures(best) if best else {}
            values = [figures.get(figure) for figure, _ in search.study.axes]
            if any(value is None for value in values):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, values)


def hypervolume(search, reference: dict[str, float]) -> float:
    """Of all artifacts, in logarithms of size and latency and in the metric's drop up to 5 points."""
    import math

    import numpy as np
    from optuna._hypervolume import compute_hypervolume

    points = []
    for t in search.history.trials:
        for c in t.outcome.candidates:
            if c.rejection is None and c.drop is not None and c.measured.packed_bytes:
                latency = c.measured.latency_ms.median / t.outcome.source_ms if c.measured.latency_ms else 1.0
                size = c.measured.packed_bytes / reference["packed_bytes"]
                points.append((math.log(size), math.log(latency), max(c.drop, 0.0) / 0.05))
    inside = np.array([p for p in points if p[0] < 0 and p[1] < 0 and p[2] < 1])
    return float(compute_hypervolume(inside, np.array([0.0, 0.0, 1.0]))) if len(inside) else 0.0


def part_goal(name: str, folder: Path, seeds: int) -> dict:
    """Trials until the goal is met, by method and seed."""
    rows = {}
    for method in ("penjing", "tpe", "nsga2"):
        for seed in range(seeds):
            place = folder / f"goal-{name}-{method}-{seed}"
            done = place.with_suffix(".json")
            if not done.exists():
                done.write_text(json.dumps(until_goal(name, GOALS[name], method, seed, place)))
            print(f"{method:<8} seed {seed}: {json.loads(done.read_text())}", flush=True)
    for done in sorted(folder.glob(f"goal-{name}-*.json")):
        method, seed = done.stem.split("-")[2:]
        rows[f"{method} {seed}"] = json.loads(done.read_text())
    return rows


def part_hypervolume(name: str, folder: Path, seconds: float) -> dict:
    """Hypervolume after the same wall time."""
    from penjing.search.search import Budget

    goal = "minimize packed_bytes, latency_ms<=1s, drop<=1%"
    rows = {}
    for seed in (0,):
        for method in ("penjing", "nsga2", "random"):
            place = folder / f"volume-{name}-{method}-{seed}"
            done = place.with_suffix(".json")
            if not done.exists():
                search = prepared_search(name, goal, seed, place, Budget(minutes=seconds / 60))
                search.clock.reserve = 0
                search.run() if method == "penjing" else from_scratch(search, method, seed, seconds)
                reference = {"packed_bytes": search.prepared.source.packed_bytes}
                row = {"hypervolume": hypervolume(search, reference), "trials": len(search.history.trials)}
                done.write_text(json.dumps(row | {"seconds": search.clock.spent}))
            rows[f"{method} {seed}"] = json.loads(done.read_text())
            print(f"{method:<8} seed {seed}: {rows[f'{method} {seed}']}", flush=True)
    return rows


def compress_command(name: str, goal: str, out: Path, *more: str) -> list[str]:
    """The command line of a search."""
    where = {"digits": "examples/digits", "resnet20": "examples/fashion_mnist"}[name]
    factory = {"digits": "trained", "resnet20": "resnet20"}[name]
    command = [sys.executable, "-m", "penjing.cli", "compress", f"{ROOT}/{where}/network.py:{factory}"]
    command += ["--task", f"{ROOT}/{where}/task.py:task", "--goal", goal, "--runtime", "onnxruntime"]
    return [*command, "--out", str(out), "--seconds", "0.2", *more]


def part_resume(name: str, folder: Path) -> dict:
    """The hash of the chosen artifact after random kills, and undisturbed."""
    goal = "minimize packed_bytes, drop<=1%"

    def hashes(out: Path) -> dict:
        record = json.loads((out / "record.json").read_text())
        chosen = next(c for c in record["candidates"] if c["name"] == record["goal"]["chosen"])
        return chosen["sha256"]

    chance = random.Random(0)
    plain, killed = folder / "resume-plain", folder / "resume-killed"
    arguments = ["--trials", "10", "--resume", "--threads", "1"]
    if not (plain / "record.json").exists():
        subprocess.run(compress_command(name, goal, plain, *arguments), check=True, capture_output=True)
    kills = 0
    while not (killed / "record.json").exists():
        process = subprocess.Popen(
            compress_command(name, goal, killed, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(chance.uniform(4, 20) if kills < KILLS else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            print(f"kill {kills}", flush=True)
    return {"kills": kills, "same": hashes(plain) == hashes(killed), "sha256": hashes(killed)}


def part_cluster(name: str, folder: Path) -> dict:
    """Trials per minute with one process and with two."""
    rows = {}
    for workers in (1, 2):
        out = folder / f"cluster-{workers}"
        if not (out / "record.json").exists():
            more = ["--trials", "12", "--threads", "1"] + (["--cluster", "auto"] if workers > 1 else [])
            subprocess.run(compress_command(name, "minimize packed_bytes, drop<=1%", out, *more), check=True)
        trials = json.loads((out / "record.json").read_text())["search"]["trials"]
        after = [row for row in trials if row["number"] >= 2]
        seconds = max(r["began_s"] + r["seconds"] for r in after) - min(r["began_s"] for r in after)
        rows[workers] = {"per_minute": 60 * len(after) / seconds, "trials": len(after), "seconds": seconds}
    return rows | {"ratio": rows[2]["per_minute"] / rows[1]["per_minute"]}


def eager_ms(network, x, seconds: float = 3.0) -> float:
    """Median latency of a network in torch, without gradients."""
    import torch

    times, end = [], time.monotonic() + seconds
    with torch.no_grad():
        while time.monotonic() < end:
            start = time.perf_counter()
            network(x)
            times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[len(times) // 2]


def part_headline(folder: Path, minutes: float) -> dict:
    """ResNet-20 on Fashion-MNIST: what a goal alone gives, next to torch and to NNCF's INT8 in OpenVINO."""
    import mixed_precision
    import torch

    from penjing import measure
    from penjing.storage.packed import packed_bytes

    threads = measure.machine(1).cores
    mixed_precision.THREADS = threads
    torch.set_num_threads(threads)
    network, task = source("resnet20")
    out, nncf = folder / "headline", folder / "nncf"
    x = task.call()[0][0][:1]

    def timed(*places: Path) -> dict:
        targets = [measure.Target(place.name, place, [x.numpy()], 1) for place in places]
        return measure.compare(targets, threads=threads, seconds=3.0, rounds=15, opener="mixed_precision:open_folder")

    if not (nncf / "model.xml").exists():
        mixed_precision.peer(network, torch.cat(list(task.calibration)), nncf)
    if not (out / "record.json").exists():
        fastest = min(eager_ms(network, x) / 10, timed(nncf)["nncf"].latency.median / 1.3)
        goal = f"minimize packed_bytes, latency_ms<={fastest:.2g}, drop<=0.5%"
        command = compress_command("resnet20", goal, out, "--minutes", str(minutes), "--resume")
        command[command.index("onnxruntime")] = "onnxruntime,openvino"
        subprocess.run(command, check=False)
    record = json.loads((out / "record.json").read_text())
    artifact, before = record["artifact"], record["source"]
    both = timed(out / "artifact", nncf)
    return {
        "goal": record["goal"]["text"],
        "met": record["goal"]["met"],
        "reason": record["goal"]["reason"],
        "speedup": before["latency_ms"]["median"] / artifact["latency_ms"]["median"],
        "speedup_over_nncf": measure.ratio(both["nncf"], both["artifact"]),
        "latency_ms": {name: vars(timing.latency) for name, timing in both.items()},
        "smaller_packed": before["packed_bytes"] / artifact["packed_bytes"],
        "smaller_than_raw": before["size_bytes"] / artifact["packed_bytes"],
        "packed_bytes": {
            "source": before["packed_bytes"],
            "artifact": artifact["packed_bytes"],
            "nncf": packed_bytes(nncf, ["model.xml", "model.bin"]),
        },
        "metric": [before["metric"], artifact["metric"]],
        "metric_nncf": mixed_precision.judged(nncf, task, network)["metric"],
        "trials": [[r["words"], r["seconds"], r["measured"], r["predicted"]] for r in record["search"]["trials"]],
        "chosen": record["search"]["chosen"],
        "stopped": record["search"]["stopped"],
        "seconds": record["search"]["seconds"],
        "minutes": record["search"]["minutes"],
    }


def main() -> None:
    """Run the parts, print, write JSON."""
    from penjing import measure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ["goal", "hypervolume", "resume", "cluster", "headline"]
    parser.add_argument("--parts", nargs="+", default=every, choices=every)
    parser.add_argument("--network", default="digits", choices=GOALS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="of the goal")
    parser.add_argument("--seconds", type=float, default=120.0, help="of every method for the hypervolume")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the headline")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/search.json")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    arguments.folder.mkdir(parents=True, exist_ok=True)
    data = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    name, folder = arguments.network, arguments.folder
    parts = {
        "goal": lambda: part_goal(name, folder, arguments.seeds),
        "hypervolume": lambda: part_hypervolume(name, folder, arguments.seconds),
        "resume": lambda: part_resume(name, folder),
        "cluster": lambda: part_cluster(name, folder),
        "headline": lambda: part_headline(folder, arguments.minutes),
    }
    for part in arguments.parts:
        key = part if part == "headline" else f"{part} {name}"
        rows = parts[part]()
        # The headline takes the threads that a user gets who says nothing.
        threads = measure.machine(1).cores if part == "headline" else OPTIONS["threads"]
        data[key] = {
            "rows": rows,
            "goal": GOALS[name],
            "machine": vars(measure.machine(threads)),
            "versions": measure.versions(),
        }
        if part == "goal":
            data[key]["goal"] = GOALS[name]
        print(f"\n{key}\n{json.dumps(rows, indent=1, default=str)[:3000]}", flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(data, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
