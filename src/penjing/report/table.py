"""Tables for the terminal: source against artifact, the candidates, the layers.

They fit into 80 columns, do not interpret names as rich's markup, and use ASCII if the terminal supports nothing else.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from penjing import records
from penjing.records.figures import FIGURES
from penjing.records.parity import by_reason
from penjing.report import arithmetic, between, numbers, scatter, verdict
from penjing.report import comparison as compared

_PLAIN = {"×": "x", "→": "->", "µ": "u", "…": "...", "·": "|", "–": "-", "−": "-", "—": "-", "≤": "<=", "≥": ">="}
_STYLES = {arithmetic.INTEGER: "green", arithmetic.HALF: "cyan", arithmetic.FLOAT: "yellow", arithmetic.UNSEEN: "dim"}


class Legible(Text):
    """Text without control characters and without characters outside the terminal's encoding."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[Segment]:
        yield from super(Legible, self._for(options)).__rich_console__(console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return super(Legible, self._for(options)).__rich_measure__(console, options)

    def _for(self, options: ConsoleOptions) -> Legible:
        shown = self.copy()
        shown.plain = legible(self.plain, options.encoding)
        return shown

    def copy(self) -> Legible:
        """A copy of the same kind; rich copies cells while it renders."""
        return Legible(
            self.plain, self.style, justify=self.justify, overflow=self.overflow, no_wrap=self.no_wrap, end=self.end
        )


class _Roomy(Table):
    """A table with two spaces between its columns if the terminal is wide enough, otherwise one."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.padding = 0
        needed = Measurement.get(console, options.update(max_width=10_000), self).maximum + len(self.columns)
        self.padding = (0, 1, 0, 0) if needed <= options.max_width else 0
        yield from super().__rich_console__(console, options)


def legible(text: str, encoding: str) -> str:
    """`text` without control characters, in ASCII if `encoding` can't represent it.

    >>> legible("3.1× → a\\x1b[31m", "ascii")
    '3.1x -> a?[31m'
    """
    shown = "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n" else c for c in text)
    try:
        shown.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        shown = "".join(_PLAIN.get(c, c) for c in shown).encode("ascii", "replace").decode()
    return shown


def comparison(record: records.Record) -> Table:
    """Source and artifact, one figure per row, with the artifact's gain.

    If drops are relative to another network, its figures are in a separate column.
    """
    table = plain_table()
    column(table, "")
    if record.reference is not None:
        column(table, "reference", "right")
    column(table, "source", "right")
    column(table, record.chosen.name if record.chosen else "artifact", "right")
    column(table, "")
    for row in compared.rows(record):
        style = {True: "green", False: "yellow", None: ""}[row.better]
        label = f"{row.label} ({row.note})" if row.note else row.label
        reference = () if record.reference is None else (row.reference_text,)
        table.add_row(*map(cell, (label, *reference, row.source_text, row.artifact_text)), cell(row.words, style))
        if row.floor is not None:
            blank = () if record.reference is None else ("",)
            table.add_row(*map(cell, (f"  {verdict.FLOOR}", *blank, row.floor_text, "", row.floor_words)))
    if record.target is not None:
        table.caption = f"latency, throughput and memory are this machine's, not those of {record.target.name}"
    return table


def gains(rows: Iterable[records.GainRow]) -> list[str]:
    """A line for every optimization: what it removed.

    >>> gains([records.GainRow(name="batch norms folded", operators=20, parameters=4_800)])
    ['batch norms folded: 20 operators, 4.80 k parameters fewer']
    """
    lines = []
    for row in rows:
        parts = [compared.plural(abs(row.operators), "operator")]
        parts += [f"{numbers.figure(row.parameters, 'count')} parameters"] if row.parameters else []
        parts += [numbers.figure(row.macs, "MACs")] if row.macs else []
        lines.append(f"{row.name}: {', '.join(parts)} {'more' if row.operators < 0 else 'fewer'}")
    return lines


def devices(record: records.Record) -> Table:
    """The artifact on this machine, and on every device that was added: a row each."""
    table = plain_table()
    column(table, "device")
    for title in ("threads", "latency", "loading", "peak memory", "energy", "parity"):
        column(table, title, "right")
    for row in compared.devices(record):
        table.add_row(*map(cell, row))
    return table


def measurements(rows: Mapping[str, records.Measured]) -> Table:
    """The results of `penjing measure`: a figure per row, an artifact per column; without figures that none has.

    Args:
        rows: Title of the column → figures of the artifact, including its latency.
    """
    table = plain_table()
    column(table, "")
    for name in rows:
        column(table, name, "right")
    for figure in FIGURES.values():
        values = [None if figure.read is None else figure.read(row) for row in rows.values()]
        if all(value is None for value in values) and figure.unit != "metric":
            continue
        if figure.unit == "metric":
            words = [numbers.ABSENT if value is None else f"{value:.4f}" for value in values]
        else:
            words = [numbers.figure(value, figure.unit) for value in values]
        table.add_row(*map(cell, (figure.label or figure.name, *words)))
        if figure.name == "latency_ms":
            _timings(table, [row.latency_ms for row in rows.values() if row.latency_ms is not None])
        if figure.name == "energy_mj":
            table.add_row(*map(cell, ("  known by", *(compared.by(row.energy_mj) for row in rows.values()))))
    return table


def _timings(table: Table, latencies: Sequence[records.Latency]) -> None:
    """Add rows on the quality of the latencies."""
    words: dict[str, Callable[[records.Latency], str]] = {
        "  p95": lambda t: numbers.figure(t.p95, "ms"),
        "  spread (IQR/median)": lambda t: f"{t.spread:.1%}",
        "  trusted": lambda t: "yes" if t.steady else f"busy machine: {t.doubt}",
        "  batch, threads": lambda t: f"{t.batch}, {t.threads}",
    }
    for word, show in words.items():
        table.add_row(*map(cell, (word, *map(show, latencies))))


def candidates(record: records.Record) -> Table:
    """Every artifact that was built, in the order of the record, with rejected ones last; a star marks the chosen one.

    ``×`` is the speed-up over the source ("busy" if the timings are unsteady), ``dB`` the signal-to-noise ratio of the
    worst output or group of columns and ``agree`` the agreement, both against the source; ``int`` is the number of
    integer operators among those counted in the runtime's graph. Below the table are notes: the lowest signal-to-noise
    ratios against what was planned with their limits, and the reasons why candidates do not meet the goal.
    """
    table = plain_table()
    column(table, "candidate")
    names = (record.metric_name, "drop", "latency", "×", "size", "dB", "agree", "int", "met")
    for name in names:
        column(table, name, "right")
    for c in (*record.candidates, *record.rejected):
        chosen = c.name == record.goal.chosen
        style = "bold" if chosen else ""
        cells = (f"{c.name} *" if chosen else c.name, *_figures(record, c))
        goal = cell("no", "red") if c.rejection else cell(*(("yes", "green") if c.met else ("no", "yellow")))
        table.add_row(*(cell(text, style) for text in cells), goal)
    shown = (*record.candidates, *record.rejected)
    reasons = by_reason((c.name, c.reason) for c in shown if c.reason and not c.met)
    notes = [] if record.selected is None else [f"{record.metric_name}: {compared.by_select(record)}"]
    notes += filter(None, [compared.against(record)])
    beside = ((c.name, compared.speedup_over_floor(record, c)) for c in record.candidates)
    over = ", ".join(f"{name} {numbers.figure(value, '×')}" for name, value in beside if value is not None)
    notes += [f"× is over torch; over {verdict.FLOOR}: {over}"] if over else []
    busy = by_reason((c.name, text) for c in record.candidates if (text := compared.busy(record, c)))
    notes += [f"busy machine: {', '.join(whose)}: {text}" for text, whose in busy]
    notes += filter(None, map(arithmetic.in_floats, record.candidates))
    notes += filter(None, (arithmetic.no_smaller(record, c) for c in record.candidates))
    notes += [*_least_db(shown), *filter(None, [between.line(record)])]
    return _captioned(table, notes + [f"{', '.join(whose)}: {text}" for text, whose in reasons])


def _least_db(shown: Sequence[records.Candidate]) -> list[str]:
    """The lowest signal-to-noise ratio of every candidate against its plan, with its limit, as a note."""
    worst = [(c.name, p.worst) for c in shown for p in c.parity if p.against == "planned" and p.worst is not None]
    parts = [f"{name} {_decibels(w.snr_db)} ({w.limit_db:.0f})" for name, w in worst if w.limit_db is not None]
    return [f"least dB against the plan (limit): {', '.join(parts)}"] if parts else []


def layers(rows: Sequence[records.LayerRow]) -> Table:
    """Cost and executed precision of every layer; reasons are listed once below the table."""
    table = plain_table()
    seen = any(r.executed is not None for r in rows)
    heads = ("parameters", "MACs", "share", "activations", *(("executed",) if seen else ("planned",)))
    column(table, "layer")
    column(table, "kind")
    for head in heads:
        column(table, head, "left" if head in ("executed", "planned") else "right")
    total = sum(r.macs for r in rows)
    reasons = {text: i for i, text in enumerate(dict.fromkeys(r.reason for r in rows if r.reason), 1)}
    for r in rows:
        executed = (r.executed or "-") if seen else r.planned
        note = f" [{reasons[r.reason]}]" if r.reason else ""
        table.add_row(
            *map(cell, (r.name, r.kind)),
            cell(numbers.figure(r.parameters, "count") if r.parameters else "-"),
            cell(numbers.figure(r.macs, "count") if r.macs else "-"),
            cell(numbers.share(r.macs / total) if total and r.macs else "-"),
            cell(numbers.figure(r.activation_bytes, "bytes") if r.activation_bytes else "-"),
            cell(executed + note, _STYLES[arithmetic.family(executed)]),
        )
    return _captioned(table, [f"[{i}] {text}" for text, i in reasons.items()])


def noise(rows: Sequence[records.NoiseRow], limit: int = 20) -> Table:
    """The `limit` operators with the most noise: weights before and after the repair, inputs, range, remedy.

    Decibels are the ratios at the network's outputs when only that operator is quantized; ``share`` is its share of the
    total noise after the repair.
    """
    table = plain_table()
    column(table, "operator")
    column(table, "")
    for head in ("weights", "repaired", "inputs", "range", "clipped", "share"):
        column(table, head, "right")
    column(table, "remedy")
    noisy = sorted(rows, key=lambda r: -max(r.share, 10 ** (-(r.weights_db or 200) / 10)))[:limit]
    largest = max((r.share for r in noisy), default=0)
    for r in noisy:
        decibels = (f"{v:.1f} dB" if v is not None else "-" for v in (r.weights_db, r.repaired_db, r.activations_db))
        reach = f"{r.low:.3g}..{r.high:.3g}" if r.low is not None and r.high is not None else "-"
        table.add_row(
            cell(r.name),
            ProgressBar(total=max(largest, 1e-12), completed=r.share, width=10),
            *map(cell, decibels),
            cell(reach),
            cell("-" if r.clipped is None else numbers.share(r.clipped)),
            cell(numbers.share(r.share)),
            cell(r.remedy, "yellow" if r.remedy == "floating point" else "green"),
        )
    return table


def branches(rows: Sequence[records.BranchesRow]) -> list[str]:
    """A line for every place where values of different kinds meet on the way to an output."""
    lines = []
    for row in rows:
        ratio = f", {row.ratio:,.0f}× apart" if row.ratio else ""
        what = f"joins values of {', '.join(row.layers)}" if row.layers != (row.name,) else "gives columns"
        decoded = "; ".join(words if words == "as they are" else f"by {words}" for words in row.decoded)
        lines.append(f"{row.name} ({row.kind}) {what}, decoded {decoded}{ratio}")
    return lines


def groups(rows: Sequence[records.GroupRow], held: Mapping[str, str], limit: int = 15) -> Table:
    """The `limit` groups of coupled channels with the most parameters; `held`: tensor that is not prunable → why."""
    table = plain_table()
    for head, justify in (("channels made by", "left"), ("units", "right"), ("tensors", "right")):
        column(table, head, "right" if justify == "right" else "left")
    for head in ("parameters", "MACs of its layers"):
        column(table, head, "right")
    column(table, "pruning is")
    for row in sorted(rows, key=lambda r: -r.parameters)[:limit]:
        exact = f"approximate: {', '.join(row.statistics[:2])}" if row.statistics else "exact"
        table.add_row(
            cell(row.name),
            cell(str(row.units)),
            cell(str(len({cut.tensor for cut in row.cuts}))),
            cell(numbers.figure(row.parameters, "count")),
            cell(numbers.figure(row.macs, "MACs")),
            cell(exact),
        )
    units = sum(row.units for row in rows)
    lines = [f"{len(rows)} groups with {units} units that can be removed"]
    lines += [f"and {len(rows) - limit} groups more"] if len(rows) > limit else []
    lines += [f"not prunable: {tensor} ({why})" for tensor, why in list(held.items())[:5]]
    lines += [f"and {len(held) - 5} more are not prunable"] if len(held) > 5 else []
    return _captioned(table, lines)


def chart(rows: Sequence[records.LayerRow], limit: int = 15) -> Table:
    """The `limit` costliest layers, with bars for multiply-accumulates and for bytes of weights."""
    table = plain_table()
    column(table, "the costliest layers")
    for head in ("MACs", "", "weights", ""):
        column(table, head, "left" if head else "right")
    macs, weights = max((r.macs for r in rows), default=0), max((r.weight_bytes for r in rows), default=0)
    for r in sorted(rows, key=lambda r: -r.macs)[:limit]:
        table.add_row(
            cell(r.name),
            ProgressBar(total=max(macs, 1), completed=r.macs, width=16),
            cell(numbers.figure(r.macs, "count")),
            ProgressBar(total=max(weights, 1), completed=r.weight_bytes, width=16),
            cell(numbers.figure(r.weight_bytes, "bytes")),
        )
    return table


def _figures(record: records.Record, candidate: records.Candidate) -> tuple[str, ...]:
    m, parity = candidate.measured, scatter.parity(candidate)
    counted = arithmetic.counted(candidate)
    speedup = compared.speedup(record, candidate)
    texts = (
        numbers.metric(m.metric, record.metric_name) if m.metric is not None else None,
        numbers.drop(candidate.drop, record.metric_name) if candidate.drop is not None else None,
        numbers.figure(m.latency_ms.median, "ms") if m.latency_ms else None,
        numbers.figure(speedup, "×") if speedup else "busy" if compared.busy(record, candidate) else None,
        numbers.figure(m.size_bytes, "bytes") if m.size_bytes is not None else None,
        _decibels(parity.least_db) if parity else None,
        _agreement(parity.agreement) if parity and parity.agreement is not None else None,
        f"{counted[0]}/{sum(counted)}" if counted else None,
    )
    return tuple(text or "-" for text in texts)


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "exact"


def _agreement(value: float) -> str:
    return "100 %" if value == 1 else numbers.share(value)


def plain_table() -> Table:
    """A table without frames, as tight as the terminal is narrow."""
    # One space between columns: ten columns have to fit into 80 characters.
    return _Roomy(box=box.SIMPLE_HEAD, padding=0, show_edge=False, header_style="bold", caption_justify="left")


def column(table: Table, head: str, justify: JustifyMethod = "left") -> None:
    """Add a column; text that is too long for it is folded."""
    table.add_column(cell(head, "bold"), justify=justify, overflow="fold")


def cell(text: str, style: str = "") -> Legible:
    """A cell whose text may come from anywhere."""
    return Legible(text, style, end="")


def _captioned(table: Table, lines: Sequence[str]) -> Table:
    if lines:
        table.caption = Legible("\n" + "\n".join(lines))  # which ends its line: another table may follow
        table.caption_style = ""
    return table
