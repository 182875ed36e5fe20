"""Reasons why a network gains no more, each with what it would gain at most without: one function a kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from penjing.analyze import roofline
from penjing.analyze.roofline import TABLES, Time
from penjing.analyze.traffic import Traffic
from penjing.pipeline.refusals import Refusal
from penjing.quantize.placement import Placement
from penjing.records import SHOWN, Balance, Finding
from penjing.report import expected, numbers
from penjing.report.comparison import plural
from penjing.steps.plan import Capabilities

WORTH = 0.01  # of the time, or of the products where nothing is known of time: less is not text
WORTH_ZEROS = 0.1  # of the weights


@dataclass(frozen=True)
class Prepared:
    """A network as a runtime's integers find it: batch norms folded, attentions unfolded."""

    capabilities: Capabilities
    entries: tuple[Traffic, ...]
    placement: Placement

    @property
    def integers(self) -> frozenset[str]:
        """Sites that compute in integers."""
        read = {edge.rpartition(":")[0] for edge in self.placement.edges.keys() - self.placement.results}
        return frozenset(read) - self.placement.floats.keys()

    @property
    def stored(self) -> frozenset[str]:
        """Sites whose weights are stored in integers."""
        return frozenset({*self.placement.weights, *self.placement.stored})

    def times(self, balance: Balance, integers: bool, floats: str = "fp32") -> dict[str, Time]:
        """Site → the least time of an operator of an artifact."""
        sites = self.integers if integers else frozenset()
        return roofline.times(self.entries, balance, sites, self.capabilities, floats)

    def why_float(self, entry: Traffic) -> str:
        """Why an operator computes in floating point in an artifact of integers; "" where it does not, or is fused."""
        row, capabilities = entry.row, self.capabilities
        if row.name in self.placement.floats:
            return self.placement.floats[row.name]
        if row.name in self.integers or row.kind in {*TABLES, *capabilities.passthrough}:
            return ""
        if roofline.fused(entry, capabilities):
            return ""
        return f"{capabilities.runtime} has no integer kernel for {row.kind}"


@dataclass(frozen=True)
class Whole:
    """The operators of a network with their times, for shares of it; without times the products stand for them."""

    entries: tuple[Traffic, ...]
    times: dict[str, Time] | None

    def size(self, entry: Traffic) -> float:
        """What an operator counts."""
        return entry.row.macs if self.times is None else self.times[entry.row.name].seconds

    def ordered(self, chosen: Iterable[Traffic]) -> list[Traffic]:
        """The operators that count most first."""
        return sorted(chosen, key=self.size, reverse=True)

    def share(self, chosen: Iterable[Traffic], size: Callable[[Traffic], float] | None = None) -> float:
        """Of some operators in all of them."""
        size = size or self.size
        return sum(map(size, chosen)) / (sum(map(size, self.entries)) or 1)

    def bound(self, saved: Callable[[Traffic], float], chosen: Iterable[Traffic]) -> float | None:
        """How many times faster the network would be without these seconds; None where nothing is known of time."""
        if self.times is None:
            return None
        whole = sum(map(self.size, self.entries))
        left = whole - sum(map(saved, chosen))
        return whole / left if left > 0 else None

    def finding(
        self, kind: str, chosen: Sequence[Traffic], saved: Callable[[Traffic], float], words: str, runtime: str = ""
    ) -> list[Finding]:
        """A finding of some operators; none where too little depends on them.

        Args:
            kind: Of the finding.
            chosen: The operators.
            saved: Seconds that an operator would take less if the cause were gone.
            words: The sentence so far; what the operators count is added.
            runtime: In which it is so.
        """
        share, bound = self.share(chosen), self.bound(saved, chosen)
        if share < WORTH or (bound is not None and 1 - 1 / bound < WORTH):
            return []
        of = "products" if self.times is None else "expected time"
        text = f"{words}. {numbers.share(share)} of the {of}"
        text += f"; without that the network would be at most {expected.times(bound)} faster" if bound else ""
        return [
            Finding(
                kind=kind,
                runtime=runtime,
                sites=tuple(e.row.name for e in self.ordered(chosen)[:SHOWN]),
                operators=len(chosen),
                macs_share=self.share(chosen, lambda e: e.row.macs),
                bytes_share=self.share(chosen, lambda e: e.row.weight_bytes),
                time_share=None if self.times is None else share,
                bound=bound,
                words=text,
            )
        ]


def of_machine(ready: Prepared, balance: Balance | None) -> list[Finding]:
    """What holds in every runtime: bytes, small operators, depthwise layers, the grid of channels, zeros."""
    whole = Whole(ready.entries, None if balance is None else ready.times(balance, integers=False))
    multiple = ready.capabilities.channel_multiple
    return [*_memory_bound(whole), *_small(whole), *_depthwise(whole), *_off_grid(whole, multiple), *_zeros(whole)]


def _memory_bound(whole: Whole) -> list[Finding]:
    times = whole.times or {}
    chosen = [e for e in whole.entries if e.row.macs and e.row.name in times and times[e.row.name].memory_bound]
    words = (
        f"{_count(chosen, 'layer', 'moves', 'move')} bytes for longer than {'it' if len(chosen) == 1 else 'they'} "
        f"multiply ({_names(whole, chosen)}): integers make that at most 4× faster, fewer bits in the weights still "
        "faster"
    )
    return whole.finding(
        "memory-bound", chosen, lambda e: times[e.row.name].bytes - times[e.row.name].arithmetic, words
    )


def _small(whole: Whole) -> list[Finding]:
    times = whole.times or {}
    chosen = [e for e in whole.entries if e.row.name in times and times[e.row.name].small]
    words = (
        f"{_count(chosen, 'operator', 'is', 'are')} so small that starting takes longer than computing "
        f"({_names(whole, chosen)}): no precision makes that faster, fewer operators do"
    )
    return whole.finding("small-operators", chosen, lambda e: times[e.row.name].start, words)


def _depthwise(whole: Whole) -> list[Finding]:
    chosen = [e for e in whole.entries if e.depthwise]
    macs = numbers.share(whole.share(chosen, lambda e: e.row.macs))
    words = (
        f"{_count(chosen, 'layer', 'is', 'are')} depthwise ({_names(whole, chosen)}) with {macs} of the products: a "
        "value is used a few times only, so that integers gain through bytes more than through arithmetic"
    )
    return whole.finding("depthwise", chosen, whole.size, words)


def _off_grid(whole: Whole, multiple: int) -> list[Finding]:
    """Layers whose channels are padded to the width of a vector."""
    times = whole.times or {}
    chosen = [e for e in whole.entries if e.channels > 1 and e.channels % multiple and e.row.macs and not e.depthwise]
    most = max((_padding(e, multiple) for e in chosen), default=0.0)
    words = (
        f"{_count(chosen, 'layer', 'writes', 'write')} a number of channels that is not divisible by {multiple} "
        f"({_names(whole, chosen)}): kernels compute up to {numbers.share(most)} of a layer for nothing; "
        "prune.Channels rounds to the multiple"
    )
    return whole.finding("off-grid", chosen, lambda e: times[e.row.name].arithmetic * _padding(e, multiple), words)


def _padding(entry: Traffic, multiple: int) -> float:
    """Share of a layer's padded channels that nobody reads."""
    return 1 - entry.channels / (-(-entry.channels // multiple) * multiple)


def _zeros(whole: Whole) -> list[Finding]:
    """Weights that are zero and multiplied all the same."""
    weighted = [e for e in whole.entries if e.channels]
    zeros, weights = (sum(e.row.weight_bytes * part for e, part in rows) for rows in _weighed(weighted))
    chosen = sorted(
        (e for e in weighted if e.zeros >= WORTH_ZEROS), key=lambda e: e.zeros * e.row.weight_bytes, reverse=True
    )
    if zeros < WORTH_ZEROS * weights or not chosen:
        return []
    names = _listed([e.row.name for e in chosen])
    return [
        Finding(
            kind="idle-zeros",
            sites=tuple(e.row.name for e in chosen[:SHOWN]),
            operators=len(chosen),
            macs_share=whole.share(chosen, lambda e: e.row.macs),
            bytes_share=whole.share(chosen, lambda e: e.row.weight_bytes),
            bound=whole.bound(lambda e: whole.size(e) * e.zeros, chosen),
            words=f"{numbers.share(zeros / weights)} of the weights are zero ({names}), and runtimes multiply by them "
            "as by other numbers: the packed file is smaller, and nothing is faster; prune.Channels removes whole "
            "channels",
        )
    ]


def _weighed(entries: Sequence[Traffic]) -> tuple[list[tuple[Traffic, float]], list[tuple[Traffic, float]]]:
    return [(e, e.zeros) for e in entries], [(e, 1.0) for e in entries]


def of_runtime(name: str, ready: Prepared, balance: Balance | None) -> list[Finding]:
    """Operators that stay in floating point in an artifact of integers, by their reason."""
    whole = Whole(ready.entries, None if balance is None else ready.times(balance, integers=True))
    chosen = [e for e in ready.entries if ready.why_float(e)]
    reasons: dict[str, list[str]] = {}
    for entry in whole.ordered(chosen):
        reasons.setdefault(ready.why_float(entry), []).append(entry.row.name)
    why = "; ".join(f"{_listed(names, 1)}: {reason}" for reason, names in list(reasons.items())[:3])
    why += f"; and {len(reasons) - 3} reasons more" if len(reasons) > 3 else ""
    words = f"{name}-int8: {_count(chosen, 'operator', 'stays', 'stay')} in floating point ({why})"

    def saved(entry: Traffic) -> float:
        assert balance is not None
        return max(0.0, whole.size(entry) - roofline.time(entry, "int8", balance).seconds)

    return whole.finding("float-island", chosen, saved, words, runtime=name)


def rounded_already(sites: Sequence[str]) -> list[Finding]:
    """Fake quantizers that the source still holds."""
    if not sites:
        return []
    words = (
        f"the source rounds to a grid already at {plural(len(sites), 'place')} ({_listed(sites)}): its fake quantizers "
        "are computed in floating point, and other integers would round a second time; give the network before them"
    )
    return [Finding(kind="fake-quantization", sites=tuple(sites[:SHOWN]), operators=len(sites), words=words)]


def without_form(runtimes: Sequence[str], operators: Mapping[str, str]) -> list[Finding]:
    """Operators without an ONNX form, for the runtimes whose files are written by way of ONNX."""
    if not operators or not runtimes:
        return []
    kinds = ", ".join(dict.fromkeys(operators.values()))
    words = (
        f"{_listed(list(operators))} ({kinds}) can't be written as ONNX, by which files for {', '.join(runtimes)} go"
    )
    sites = tuple(operators)
    return [Finding(kind="blocked", sites=sites[:SHOWN], operators=len(sites), words=words)]


def blocked(name: str, rows: Sequence[Refusal]) -> list[Finding]:
    """Operators that a runtime can't take."""
    sites = [site for row in rows for site in (*row.sites, *row.alike)]
    if not sites:
        return []
    words = f"{name} can't take {_listed(sites)}: {rows[0].reason}"
    return [Finding(kind="blocked", runtime=name, sites=tuple(sites[:SHOWN]), operators=len(sites), words=words)]


def _names(whole: Whole, chosen: Iterable[Traffic]) -> str:
    return _listed([e.row.name for e in whole.ordered(chosen)])


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _count(chosen: Sequence[Traffic], noun: str, one: str, many: str) -> str:
    return f"{plural(len(chosen), noun)} {one if len(chosen) == 1 else many}"
