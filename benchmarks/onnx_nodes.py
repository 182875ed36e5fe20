"""The node tests of the ONNX standard, through the captured network and back in ONNX Runtime.

Each test that takes part (tests/sources/onnx_nodes.py says which don't, and why) becomes a network, is captured,
exported again and run in ONNX Runtime; both answers are compared within the test's own tolerances.

    python benchmarks/onnx_nodes.py [--folder DIR]

A table by operator is printed and results/onnx_nodes.json is written; a run that was stopped goes on.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "sources"))
RESULTS = ROOT / "benchmarks" / "results" / "onnx_nodes.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "onnx_nodes", help="what is done is kept here")
    folder = parser.parse_args().folder
    warnings.filterwarnings("ignore")
    import onnx
    import onnx_nodes
    import onnxruntime
    import torch

    from penjing.measure.machine import machine

    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / "done.jsonl"
    done = dict(map(json.loads, journal.read_text().splitlines())) if journal.exists() else {}
    names = onnx_nodes.taking_part()
    with journal.open("a") as file:
        for count, name in enumerate(names, 1):
            if name in done:
                continue
            done[name] = outcome(onnx_nodes, name)
            print(json.dumps([name, done[name]]), file=file, flush=True)
            if count % 50 == 0:
                print(f"{count} of {len(names)}", file=sys.stderr, flush=True)
    by_operator = {}
    for name in names:
        operator = name_of(onnx_nodes.cases()[name])
        row = by_operator.setdefault(operator, {"tests": 0, "passed": 0})
        row["tests"] += 1
        row["passed"] += done[name] == "passed"
    passed = sum(row["passed"] for row in by_operator.values())
    print("| operator | tests | passed |\n|---|---|---|")
    for operator, row in sorted(by_operator.items()):
        print(f"| {operator} | {row['tests']} | {row['passed']} |")
    print(f"| **all** | {len(names)} | {passed} ({passed / len(names):.1%}) |")
    left_out = Counter(filter(None, map(onnx_nodes.left_out, onnx_nodes.cases().values())))
    result = {
        "machine": machine(1).__dict__ | {"instruction_sets": list(machine(1).instruction_sets)},
        "versions": {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__, "torch": torch.__version__},
        "tests": len(names),
        "passed": passed,
        "by_operator": by_operator,
        "failed": {name: text for name, text in done.items() if text != "passed" and name in names},
        "left_out": dict(left_out),
    }
    RESULTS.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def outcome(onnx_nodes, name):
    """`passed`, or what went wrong."""
    try:
        onnx_nodes.Node(name).captured_and_exported()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "passed"


def name_of(case):
    """The operator that a test is about."""
    nodes = case.model.graph.node
    return nodes[0].op_type if len(nodes) == 1 else case.name.removeprefix("test_").split("_")[0]


if __name__ == "__main__":
    main()
