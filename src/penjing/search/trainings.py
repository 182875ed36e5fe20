"""The trainings of a run, as its events tell them."""

from __future__ import annotations

import json
from pathlib import Path

from penjing.records import Training, from_dict


def read(events: Path) -> tuple[Training, ...]:
    """Every training that came to its end, in their order; one that was told twice, around a crash, counts once."""
    found: list[Training] = []
    stage = ""
    for line in events.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # the line that a crash cut off
            continue
        if event.get("kind") == "stage":
            stage = event["name"]
        elif event.get("kind") == "trained":
            told = from_dict(Training, {"name": stage, "curve": event["curve"]})
            if told not in found:
                found.append(told)
    return tuple(found)


__all__ = ["read"]
