"""The trainings of a run, as its events tell them."""

from __future__ import annotations

from pathlib import Path

from penjing.errors import RecordError
from penjing.records import Training, from_dict, reading

MOST_BYTES = 1 << 30  # of the events of a run


def read(events: Path) -> tuple[Training, ...]:
    """Every training that came to its end, in their order; one that was told twice, around a crash, counts once.

    Raises:
        RecordError: The file is missing or something else than a file.
    """
    try:
        lines = reading.data(events, MOST_BYTES).decode("utf-8", "replace").splitlines()
    except (OSError, ValueError) as error:
        raise RecordError(
            "the events of the run can't be read", got=f"{events}: {error}", remedy="--force starts anew"
        ) from None
    found: list[Training] = []
    stage = ""
    for line in lines:
        try:
            event = reading.json_text(line, finite=False)
        except ValueError:  # the line that a crash cut off
            continue
        if not isinstance(event, dict):
            continue
        if event.get("kind") == "stage":
            stage = str(event.get("name"))
        elif event.get("kind") == "trained":
            told = from_dict(Training, {"name": stage, "curve": event.get("curve")})
            if told not in found:
                found.append(told)
    return tuple(found)


__all__ = ["read"]
