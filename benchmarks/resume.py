"""A run that is killed during training resumes and produces the same bits.

The joint recipe on scikit-learn's digits (a small ResNet-20, `--epochs`), from the network to the ONNX Runtime file. It
runs once to the end. Then, for every fraction of its training steps, a new process is killed with SIGKILL as soon as
its events report that step, and another one continues with ``resume=True``. The files are compared by their SHA-256.
The longest training run is plotted as in the report.

    python benchmarks/resume.py [--fractions 0.25 0.5 0.9] [--epochs 20]
        [--picture docs/assets/training.svg]
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FILES = {"the file": "artifact/model.onnx", "the weights": "weights.safetensors"}
DRAWN = re.compile(r"\s*(svg (text|\.grid|\.axis)|polyline|\.curve\.)")
STYLE = "svg { background: var(--sheet); font: 12px var(--plain); }"


def run(folder, epochs, resume):
    """Perform the run in this process, saving the state every second."""
    from dataclasses import replace

    import penjing as pj
    from examples.digits.network import trained
    from examples.digits.task import task

    def often(step):
        if isinstance(step, pj.prune.Iterative):
            return replace(step, finetune=often(step.finetune))
        return replace(step, save_every_s=1.0) if hasattr(step, "save_every_s") else step

    recipe = pj.Recipe(*map(often, pj.recipes.joint(macs=0.5, epochs=epochs, learning_rate=0.05)))
    pj.run(recipe, trained(), task(), runtime="onnxruntime", goal="minimize size_bytes", out=folder, resume=resume,
           threads=1, seconds=0.1)  # fmt: skip


def child(folder, epochs, resume):
    """Perform the run in a separate process."""
    command = [sys.executable, __file__, "--run", str(folder), "--epochs", f"{epochs:g}"]
    return subprocess.Popen(command + ["--resume"] * resume, stdout=subprocess.DEVNULL)


def events(folder, kind):
    """The events of a run so far."""
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    matching = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # it is being written, or was truncated
            continue
        if event.get("kind") == kind:
            matching.append(event)
    return matching


def digests(folder):
    """SHA-256 of the files of a run."""
    return {name: hashlib.sha256((folder / path).read_bytes()).hexdigest() for name, path in FILES.items()}


def killed(folder, epochs, told):
    """Kill a run at a point of its training; then let another process resume it."""
    process = child(folder, epochs, False)
    while len(points := events(folder, "training")) < told and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    status = process.wait()
    child(folder, epochs, True).wait()
    went_on = [event.get("step") or event["candidate"] for event in events(folder, "resumed")]
    return {"status": status, "killed at": f"{points[-1]['step']} of {points[-1]['steps']} steps", "went on": went_on}


def image(folder):
    """The largest curve of the report, with the report's colours, as a file of its own."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    rules = re.findall(r"[^{}]+{[^{}]*}", re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1])
    root = next(rule for rule in rules if ":root" in rule)
    style = "".join([re.sub(r"/\*.*?\*/", "", root), *(rule for rule in rules if DRAWN.match(rule)), STYLE])
    curve = max(re.findall(r'<svg [^>]*aria-labelledby="curve-\d+".*?</svg>', page, re.DOTALL), key=len)
    return curve.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        ">", f"><style>{style}</style>", 1
    )


def main() -> None:
    """Run all, print the table, write JSON and the image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25, 0.5, 0.9])
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--run", type=Path, help="one run, in this process")
    parser.add_argument("--resume", action="store_true", help="go on with it")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/assets/training.svg")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/resume.json")
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run, arguments.epochs, arguments.resume)
        return
    from penjing import measure

    data = {"machine": vars(measure.machine(1)), "versions": measure.versions(), "rows": []}
    with tempfile.TemporaryDirectory() as aside:
        whole = Path(aside) / "whole"
        if child(whole, arguments.epochs, False).wait():
            raise SystemExit("the whole run failed")
        expected, points = digests(whole), len(events(whole, "training"))
        data["digests"] = expected
        for fraction in arguments.fractions:
            folder = Path(aside) / f"{fraction:g}"
            row = killed(folder, arguments.epochs, max(1, round(fraction * points)))
            row |= {"fraction": fraction, "same": {n: d == expected[n] for n, d in digests(folder).items()}}
            data["rows"].append(row)
            print(f"killed at {row['killed at']} ({row['status']}), went on with {row['went on']}: {row['same']}")
        arguments.picture.write_text(image(whole), encoding="utf-8")
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    print(f"{arguments.out}\n{arguments.picture}")


if __name__ == "__main__":
    main()
