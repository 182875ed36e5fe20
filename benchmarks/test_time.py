"""What the tests cost: wall-clock and processor time of every part of `make test`.

The parts and the linters are run as the Makefile runs them, several at a time, in its order. Processor time is that
of a part with all processes that it started; `idle` is the share of the cores that nothing used.

    python benchmarks/test_time.py [--jobs 3] [--parts quantize pipeline]
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COUNTS = re.compile(rb"=+ (?:(\d+) failed, )?(\d+) passed(?:, (\d+) skipped)?")


def parts() -> list[str]:
    """Targets of the Makefile, in its order."""
    line = re.search(r"^PARTS\s*:=\s*(.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return [*(f"tests-{name}" for name in line[1].split()), "lint"]


def start(target: str, log: Path) -> int:
    """Start `make TARGET` with its output in a file; returns the process id."""
    with log.open("wb") as output:
        actions = [(os.POSIX_SPAWN_DUP2, output.fileno(), stream) for stream in (1, 2)]
        return os.posix_spawnp("make", ["make", "-C", str(ROOT), target], os.environ, file_actions=actions)


def run(targets: list[str], jobs: int, logs: Path) -> list[dict]:
    """Run all targets, `jobs` at a time; a row each."""
    waiting, running, rows = list(targets), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            target = waiting.pop(0)
            running[start(target, logs / target)] = target, time.monotonic()
        pid, status, usage = os.wait3(0)
        target, began = running.pop(pid)
        output = (logs / target).read_bytes()
        failed, passed, skipped = (int(count or 0) for count in (COUNTS.findall(output) or [(0, 0, 0)])[-1])
        row = {
            "target": target,
            "exit_code": os.waitstatus_to_exitcode(status),
            "passed": passed,
            "failed": failed,
            "skipped": skipped,
            "seconds": time.monotonic() - began,
            "processor_s": usage.ru_utime + usage.ru_stime,
        }
        rows.append(row)
        print(shown(row), flush=True)
        if row["exit_code"]:
            print(output.decode(errors="replace")[-6000:], flush=True)
    return rows


def shown(row: dict) -> str:
    """A line of the table."""
    numbers = "".join(f"{row[key]:>9.0f}" for key in ("passed", "failed", "skipped", "seconds", "processor_s"))
    return f"{row['target']:<18}{numbers}"


def main() -> int:
    """Run, print the table, write JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=3, help="targets at a time (default: 3, as the Makefile)")
    parser.add_argument("--parts", nargs="+", help="of the Makefile's PARTS (default: all, and lint)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/test_time.json")
    arguments = parser.parse_args()
    targets = parts() if arguments.parts is None else [f"tests-{name}" for name in arguments.parts]
    print(
        f"{'':<18}" + "".join(f"{word:>9}" for word in ("passed", "failed", "skipped", "wall s", "CPU s")), flush=True
    )
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as logs:
        rows = run(targets, arguments.jobs, Path(logs))
    seconds = time.monotonic() - began
    from penjing.measure import machine, versions

    total = {key: sum(row[key] for row in rows) for key in ("passed", "failed", "skipped", "processor_s")}
    total |= {"target": "all", "seconds": seconds}
    total["idle"] = 1 - total["processor_s"] / (seconds * (os.cpu_count() or 1))
    print(f"{shown(total)}   idle {total['idle']:.0%}")
    data = {"machine": vars(machine(1)), "versions": versions(), "jobs": arguments.jobs, "rows": rows, "total": total}
    arguments.out.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    return int(any(row["exit_code"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
