"""What a network will gain at most, and why not more: from its operators, its runtimes and the machine, in seconds."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import fx

from penjing.analyze.cost import Call
from penjing.analyze.roofline import Time
from penjing.analyze.traffic import fake_quantized, traffic
from penjing.onnx_files.untranslated import untranslated
from penjing.pipeline import findings, machine_balance
from penjing.pipeline.building import INTEGER
from penjing.pipeline.findings import Prepared
from penjing.pipeline.refusals import Refusal
from penjing.quantize.placement import place
from penjing.quantize.static import prepare
from penjing.records import Balance, Diagnosis, Expectation, Measured, Record, steadiness
from penjing.report import comparison
from penjing.runtimes import SPECS
from penjing.steps.plan import Capabilities

FLOATS = {"int8": "fp32", "int8-bf16": "bf16", "int8-fp16": "fp32", "fp16": "fp32"}
"""What the operators of an artifact compute in that are not integers; half precision in a file is widened."""


def prepared(network: fx.GraphModule, call: Call, capabilities: Capabilities) -> Prepared:
    """The network for one runtime; it is copied, not modified."""
    mine = copy.deepcopy(network)
    prepare(mine, capabilities)
    return Prepared(capabilities, traffic(mine, call), place(mine, capabilities, {}))


def diagnose(
    network: fx.GraphModule,
    runtimes: Mapping[str, Prepared],
    instruction_sets: Sequence[str],
    threads: int,
    *,
    here: bool = True,
    quantizes: bool = True,
    refused: Mapping[str, Sequence[Refusal]] | None = None,
) -> Diagnosis:
    """Findings and expectations.

    Args:
        network: A captured network.
        runtimes: Name → the network as its integers find it.
        instruction_sets: Of the processor that artifacts are for.
        threads: Of the run.
        here: Whether that processor is this machine's: otherwise nothing is said of time.
        quantizes: Whether integers are to be made at all.
        refused: Runtime → the operators that it can't take, where it was asked.
    """
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    balance = machine_balance.balance(size, instruction_sets, threads) if here else None
    rows = [row for name, refusals in (refused or {}).items() for row in findings.blocked(name, refusals)]
    by_onnx = [n for n in runtimes if n in SPECS and "onnx" in SPECS[n].packages and n not in (refused or {})]
    rows += findings.without_form(by_onnx, untranslated(network) if by_onnx else {})
    rows += findings.rounded_already(fake_quantized(network))
    for ready in list(runtimes.values())[:1]:
        rows += findings.of_machine(ready, balance)
    integers = {n: r for n, r in runtimes.items() if quantizes and set(INTEGER).intersection(r.capabilities.precisions)}
    rows += [row for name, ready in integers.items() for row in findings.of_runtime(name, ready, balance)]
    expectations = [
        row
        for name, ready in runtimes.items()
        for row in _expectations(name, ready, balance, size)
        if quantizes or row.precision not in INTEGER
    ]
    return Diagnosis(findings=tuple(rows), expectations=tuple(expectations), balance=balance)


def _expectations(name: str, ready: Prepared, balance: Balance | None, size: int) -> Iterator[Expectation]:
    """What every precision of a runtime gains at most over fp32 there."""
    stored = sum(e.matrix_bytes for e in ready.entries if e.row.name in ready.stored)
    for precision in ready.capabilities.precisions:
        if precision == "fp32":
            continue
        narrow = size - stored + stored // 4 if precision in INTEGER else size // 2 if precision == "fp16" else size
        faster = None
        # A file in half precision is narrower; whether it is computed in half, where the processor can, is not known.
        if balance is not None and (precision != "fp16" or balance.rates["fp16"] == 1):
            before = ready.times(balance, integers=False)
            after = ready.times(balance, precision in INTEGER, FLOATS.get(precision, precision))
            faster = _seconds(before) / (_seconds(after) or 1)
        yield Expectation(runtime=name, precision=precision, faster=faster, smaller=size / (narrow or 1))


def _seconds(times: Mapping[str, Time]) -> float:
    return sum(time.seconds for time in times.values())


def compared(diagnosis: Diagnosis, record: Record) -> Diagnosis:
    """The diagnosis with what the run measured beside what was expected."""
    candidates = {(c.runtime, c.precision): c for c in (*record.candidates, *record.rejected)}
    rows = []
    for row in diagnosis.expectations:
        candidate = candidates.get((row.runtime, row.precision))
        plain = None if candidate is None else comparison.floor(record, candidate)
        if row.runtime in record.floors:
            rows.append(replace(row, doubt="the recipe changed the network"))
        elif candidate is None or plain is None:
            rows.append(row)
        else:
            rows.append(_measured(row, plain, candidate.measured))
    effort = diagnosis.effort
    if effort is not None:
        took = sum(step.wall_s for step in record.steps)
        peak = max((step.peak_memory_bytes for step in record.steps), default=0)
        effort = replace(effort, took_s=round(took, 3), peak_memory_bytes=peak)
    return replace(diagnosis, expectations=tuple(rows), effort=effort)


def _measured(row: Expectation, plain: Measured, candidate: Measured) -> Expectation:
    before, after = plain.latency_ms, candidate.latency_ms
    if before is not None and after is not None and min(before.median, after.median) > 0:
        row = replace(row, faster_measured=steadiness.speedup(before, after), doubt=steadiness.doubt(before, after))
    if plain.size_bytes and candidate.size_bytes:
        row = replace(row, smaller_measured=plain.size_bytes / candidate.size_bytes)
    return row
