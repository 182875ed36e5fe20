"""What `inspect --runtime` tells: whether a runtime takes the network, and which operators it can't take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from penjing.pipeline.refusals import Refusal

_STAGES = {"export": "can't be exported", "open": "can't be opened", "run": "fails when it runs"}


def asked(given: Sequence[str], save: str | None) -> tuple[str, ...]:
    """The runtimes that are asked: those that were named, or all that are installed; none without either option.

    Raises:
        UsageError: There is no such runtime.
        MissingDependency: It is not installed.
    """
    from penjing.pipeline.order import runtime_names

    names = ",".join(given)
    if not names and save is None:
        return ()
    return runtime_names(None if names in ("", "all") else names)


def lines(refused: Mapping[str, tuple[Refusal, ...]]) -> Iterator[str]:
    """A line for every runtime, and for every operator that it can't take."""
    for runtime, refusals in refused.items():
        if not refusals:
            yield f"\n{runtime} takes every operator: exported, opened and run"
            continue
        if refusals[0].kind == "network":
            yield f"\n{runtime} can't take this network as a whole"
            yield from list(_one(refusals[0]))[1:]
            continue
        count = sum(1 + len(refusal.alike) for refusal in refusals)
        yield f"\n{runtime} can't take this network: {count} {'place' if count == 1 else 'places'}"
        for refusal in refusals:
            yield from _one(refusal)


def _one(refusal: Refusal) -> Iterator[str]:
    many = len(refusal.sites) > 1
    name = f"{refusal.sites[0]} to {refusal.sites[-1]} ({len(refusal.sites)})" if many else refusal.sites[0]
    where = f" ({refusal.where})" if refusal.where else ""
    yield f"  {name}: {refusal.kind}{where} {_STAGES[refusal.stage]}" + (
        "; with the sizes of the example it runs, so that fixed axes are a way out" if refusal.shapes else ""
    )
    yield f"    {refusal.reason}"
    if refusal.alike:
        yield f"    so do {', '.join(refusal.alike)}"
    if refusal.saved:
        yield f"    written to {refusal.saved}"
