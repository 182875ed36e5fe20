"""The command `runtimes`: which are installed here, and what each accelerates on this processor."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from rich.markup import escape
from rich.table import Table

from penjing.cli.console import Terminal


def runtimes(parsed: argparse.Namespace, messages: Terminal) -> int:
    """Tell every runtime that Penjing knows."""
    from penjing import measure

    machine = measure.machine(1)
    rows = _rows(machine.instruction_sets)
    if parsed.json:
        print(json.dumps({"machine": dataclasses.asdict(machine), "runtimes": rows}, indent=2))
        return 0
    out = Terminal()
    out.print(f"{machine.processor}, {machine.cores} cores: {', '.join(machine.instruction_sets)}", highlight=False)
    table = Table("runtime", "packages", "precisions here", "what it computes in integers, and what is to be known")
    for row in rows:
        words = [", ".join(row["integer_operators"])] if row["integer_operators"] else []
        table.add_row(
            row["runtime"] + ("" if row["by_default"] or not row["installed"] else " *"),
            "\n".join(f"{name} {version}" for name, version in row["versions"].items())
            if row["installed"]
            else "not installed",
            ", ".join(row["precisions"]),
            escape("\n".join([*words, *row["notes"]])),
        )
    out.print(table)
    out.print("* considered when it is named: --runtime NAME, or --runtime all", highlight=False)
    return 0


def _rows(instruction_sets: tuple[str, ...]) -> list[dict[str, Any]]:
    from penjing import measure
    from penjing import runtimes as known

    every = measure.versions()
    rows: list[dict[str, Any]] = []
    for name, spec in known.SPECS.items():
        refusal = known.missing(name)
        versions = {package: every[package] for package in (*spec.packages, *spec.distributions) if package in every}
        row: dict[str, Any] = {
            "runtime": name,
            "installed": refusal is None,
            "by_default": spec.by_default,
            "version": next(iter(versions.values()), None),
            "versions": versions,
            "precisions": [],
            "integer_operators": [],
            "notes": [],
        }
        if refusal is not None:
            clash = [str(refusal.got)] if refusal.code == "clash" else []
            row["notes"] = [*clash, str(refusal.remedy)]
        else:
            capabilities = known.get(name).capabilities(instruction_sets)
            integers = sorted(capabilities.integer) if "int8" in capabilities.precisions else []
            row |= {"precisions": list(capabilities.precisions), "integer_operators": integers}
            row["notes"] = [*filter(None, [known.absent(name)]), *capabilities.notes]
        rows.append(row)
    return rows
