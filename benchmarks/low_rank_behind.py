"""What fitting the whole layers behind decomposed ones gains before any training.

The networks of `low_rank.py`, decomposed to the same fractions of the multiply-accumulates, at the same ranks in all
four rows: the factors fitted or not (`refit`), and the layers that stay whole fitted or not (`reconstruct`). Judged by
accuracy on test data and by the signal-to-noise ratio of the logits, as test data are no calibration data.

    python benchmarks/low_rank_behind.py [--networks vgg16 minilm] [--targets 0.5 0.3] [--judged 400] [--threads 2]

Every finished row is written immediately; a second call resumes where the first stopped.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
WAYS = {
    "nothing": {"refit": False},
    "whole layers": {"refit": False, "reconstruct": True},
    "factors": {"refit": True},
    "factors and whole layers": {"refit": True, "reconstruct": True},
}


def decomposed(draft, task, **settings):
    """The decomposed draft."""
    from penjing.decompose import LowRank
    from penjing.steps.step import Context

    return LowRank(**settings)(draft, Context(task=task, seed=0, source=draft.network))


def fitted(before, after):
    """Names of the whole layers whose weights changed, of all that stay whole."""
    import torch

    gone = {edit["layer"] for edit in after.edits}
    named = ((name.removesuffix(".weight"), p) for name, p in before.network.named_parameters() if p.dim() > 1)
    whole = {name: p for name, p in named if name not in gone}
    changed = (name for name, p in whole.items() if not torch.equal(p, after.network.get_submodule(name).weight))
    return sorted(changed), len(whole)


def logits_db(draft, other, task):
    """Signal-to-noise ratio of the logits of the test data, in dB."""
    import numpy as np

    from penjing.tasks.outputs import numpy_predictor

    outputs = []
    for each in (draft, other):
        predict, seen = numpy_predictor(each.network), []

        def keeping(*args, predict=predict, seen=seen, **kwargs):
            seen.append(predict(*args, **kwargs))
            return seen[-1]

        accuracy = task.evaluate(keeping)
        outputs.append((accuracy, np.concatenate(seen).astype(np.float64)))
    (_, before), (accuracy, after) = outputs
    return accuracy, float(10 * np.log10((before**2).sum() / ((before - after) ** 2).sum()))


def main() -> None:
    """Run all that is missing, print it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["vgg16", "minilm"])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--judged", type=int, default=400, help="at most so many test texts")
    parser.add_argument("--train-texts", type=int, default=3000, help="that MiniLM's classifier is trained on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/low_rank_behind.json")
    arguments = parser.parse_args()
    import torch
    from low_rank import source

    from penjing import measure
    from penjing.network.capture import capture_network
    from penjing.steps.draft import Draft

    torch.set_num_threads(arguments.threads)
    data = {"machine": vars(measure.machine(arguments.threads)), "versions": measure.versions(), "rows": {}}
    if arguments.out.exists():
        data["rows"] = json.loads(arguments.out.read_text())["rows"]
    for name in arguments.networks:
        every = [f"{name}, {target:g}, {way}" for target in arguments.targets for way in WAYS]
        if all(key in data["rows"] for key in every):
            continue
        module, task = source(name, arguments)
        draft = Draft(capture_network(module, *task.call(), task.dynamic))
        for target in arguments.targets:
            ranks = None
            for way, settings in WAYS.items():
                key = f"{name}, {target:g}, {way}"
                if key in data["rows"]:
                    continue
                start = time.perf_counter()
                chosen = {"macs": target} if ranks is None else {"ranks": ranks}
                result = decomposed(draft, task, **chosen, **settings)
                ranks = {edit["layer"]: tuple(edit["ranks"]) for edit in result.edits}
                changed, whole = fitted(draft, result)
                accuracy, decibels = logits_db(draft, result, task)
                data["rows"][key] = {
                    "accuracy": accuracy, "logits_db": decibels, "fitted": changed, "whole": whole,
                    "decomposed": len(ranks),
                }  # fmt: skip
                arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n")
                print(f"{key:<50}{accuracy:>8.4f}{decibels:>8.1f} dB  fitted {len(changed)} of {whole} whole layers, "
                      f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    print(f"\n{arguments.out}")


if __name__ == "__main__":
    main()
