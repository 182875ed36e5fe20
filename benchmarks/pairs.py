"""Every technique before every other, on a small network: parity of the artifact, or the reason for the refusal.

The orders and the network are those of `tests/pairs.py`: a residual network on scikit-learn's digits, trained for
seconds. *Noise* compares the ONNX file in ONNX Runtime with the network in torch.

    python benchmarks/pairs.py

Every finished order is written immediately; a second call resumes where the first stopped.
"""

import copy
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RESULTS = ROOT / "benchmarks" / "results" / "pairs.json"
VERSIONS = ("penjing", "torch", "onnxruntime")


def main():
    import pairs

    from penjing import measure
    from penjing.errors import DecompositionError, PruningError, QuantizationError, RecipeError, SharingError
    from penjing.recipes.recipe import Recipe

    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"orders": {}}
    results["machine"] = vars(measure.machine(1))
    results["versions"] = {name: importlib.metadata.version(name) for name in VERSIONS}
    results["techniques"] = {name: family for name, (family, _) in pairs.TECHNIQUES.items()}
    data = pairs.task()
    source = pairs.trained(data)
    for first in pairs.TECHNIQUES:
        for second in pairs.TECHNIQUES:
            order = f"{first} → {second}"
            if order in results["orders"]:
                continue
            try:
                recipe = Recipe(*pairs.steps(first, second))  # which checks the order
            except RecipeError as error:
                row = {"refused": error.what, "expected": str(error.expected)}
            else:
                try:
                    with tempfile.TemporaryDirectory() as folder:
                        row = pairs.artifact(recipe, copy.deepcopy(source), data, Path(folder))
                except (
                    DecompositionError,
                    PruningError,
                    QuantizationError,
                    SharingError,
                ) as error:  # of what the first one leaves
                    row = {"refused": error.what, "expected": str(error.expected)}
            print(f"{order:80} {row.get('refused') or '{:.0f} dB'.format(row['snr_db'])}", flush=True)
            results["orders"][order] = row | {"processor": results["machine"]["processor"]}
            aside = RESULTS.with_suffix(".new")
            aside.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            aside.replace(RESULTS)


if __name__ == "__main__":
    main()
