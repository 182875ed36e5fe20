"""The command `targets`: the devices that artifacts can be made for, and what each allows."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from penjing.cli.console import Terminal
from penjing.report.numbers import figure
from penjing.targets import Target, load, names
from penjing.targets.reading import PROFILES, SUFFIXES, read


def targets(parsed: argparse.Namespace, messages: Terminal) -> int:
    """List the profiles, or show one of them, or one of the user's own."""
    if parsed.yaml:
        print(_text(parsed.name or "pi4"), end="")
        return 0
    out = Terminal()
    if parsed.name is None:
        profiles = [load(name) for name in names()]
        if parsed.json:
            print(json.dumps([_plain(target) for target in profiles], indent=2))
            return 0
        out.print(_listed(profiles))
        return 0
    target = load(parsed.name)
    if parsed.json:
        print(json.dumps(_plain(target), indent=2))
        return 0
    for text in _lines(target):
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def _text(name: str) -> str:
    if not name.lower().endswith(SUFFIXES):
        return read(PROFILES / f"{load(name).name}.yaml")
    return read(Path(name))


def _plain(target: Target) -> dict[str, Any]:
    """As JSON has it; "any" kinds are null."""
    data = dataclasses.asdict(target)
    for name in ("legal", "integer"):
        data[name] = None if data[name] is None else sorted(data[name])
    return data


def _listed(profiles: list[Target]) -> Table:
    table = Table("target", "runtimes", "precisions", "storage", "memory", show_lines=True)
    for name, width in (("runtimes", 12), ("precisions", 10)):  # in 80 columns, a name then keeps to one line
        next(column for column in table.columns if column.header == name).max_width = width
    for target in profiles:
        table.add_row(
            f"[bold]{target.name}[/bold]\n{escape(target.description)}",
            ", ".join(target.runtimes),
            ", ".join(target.precisions),
            _size(target.limits.storage_bytes),
            _size(target.limits.memory_bytes),
        )
    return table


def _size(limit: int | None) -> str:
    """As memories are sold: in multiples of 1,024."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if limit is not None and limit >= size and limit % size == 0:
            return f"{limit // size} {unit}"
    return "" if limit is None else figure(limit, "bytes")


def _lines(target: Target) -> list[str]:
    sets, words = target.instruction_sets, {True: "symmetric", False: "asymmetric"}
    cores = f"{target.cores} {'core' if target.cores == 1 else 'cores'}"
    lines = [
        f"{target.name}: {target.description}",
        f"runtimes: {', '.join(target.runtimes)}; precisions: {', '.join(target.precisions)}",
        f"instruction sets: {', '.join(sets) or 'none that kernels tell apart'}; {cores}",
        f"integer operators: {'all that the runtime has' if target.integer is None else _kinds(target.integer)}",
        f"operators that it has at all: {'any' if target.legal is None else _kinds(target.legal)}",
    ]
    for what, formats in (("weights", target.weights), ("activations", target.activations)):
        signs = " or ".join("signed" if signed else "unsigned" for signed in formats.signed)
        grids = " or ".join(words[symmetric] for symmetric in formats.symmetric)
        bits = ", ".join(map(str, formats.bits))
        lines.append(f"{what}: {bits} bits, {signs}, {grids}, one scale a {' or '.join(formats.per)}")
    storage, memory = _size(target.limits.storage_bytes), _size(target.limits.memory_bytes)
    lines.append(
        f"storage: {storage or 'no limit known'}; memory: {memory or 'no limit known'}, "
        f"weights are read from {target.limits.weights_in}"
    )
    if target.check is not None:
        settings = f"{target.check.accelerator}, {target.check.system}, {target.check.memory}"
        lines.append(f"checked with {target.check.compiler}: {settings}")
    lines += [f"then: {command}" for command in target.commands]
    lines += [f"note: {note}" for note in target.notes]
    return lines + [f"source: {source.fact}: {source.at}" for source in target.sources]


def _kinds(kinds: frozenset[str]) -> str:
    return ", ".join(sorted(kinds))
