"""A listener that hands a run to a tracker: what was asked for, curves, the figures of every candidate, the verdict."""

from __future__ import annotations

import contextlib
import importlib
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from penjing.errors import UsageError
from penjing.records.differences import settings_of
from penjing.records.events import Listener
from penjing.records.figures import FIGURES
from penjing.records.folder import ARTIFACT, RECORD
from penjing.watch.tracker import Tracker

KINDS = ("mlflow", "tensorboard", "wandb")
PROGRESS_EVERY_S = 5.0
REPORT = "report.html"
_EXAMPLES = "mlflow:sqlite:///mlflow.db, tensorboard:runs/tb or wandb:PROJECT"


class Log:
    """A listener for `listeners=`, and a context that closes it however the run ends.

    What breaks while a run goes on (a full disk, a server that went away) is told once as a warning; the run goes on
    without the log.

    Args:
        where: What it is called in warnings.
        tracker: What it writes to.
        tell: What a warning is given to; None warns as Python does.
    """

    def __init__(self, where: str, tracker: Tracker, tell: Callable[[str], None] | None = None) -> None:
        self.where = where
        self.tell = tell
        self._tracker: Tracker | None = tracker  # None: broken, or closed
        self._begun = False
        self._folder = Path()
        self._shown: dict[str, float] = {}
        self._trainings: dict[Any, int] = defaultdict(lambda: 1)  # by trial
        self._warnings = 0
        self._figures: dict[str, dict[str, float]] = {}

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Hand one event on; events without a handler are not kept."""
        kind = str(event.get("kind"))
        handler = _HANDLERS.get(kind)
        if "trial" in event and kind not in _WITHIN:
            return  # what happens within one of many: how it ended is told by "tried"
        if self._tracker is None or handler is None or not (self._begun or kind == "requested"):
            return
        self._safely(lambda: handler(self, event))

    def close(self, failure: str | None = None) -> None:
        """End the run in the tracker, if it has not ended by itself; `failure` says why it broke off."""
        tracker = self._tracker
        if tracker is not None:
            self._safely(lambda: tracker.end(failure or "the run did not come to its end"))
        self._tracker = None

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": "))

    def _safely(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker's library raises: the run is worth more than its log
            self._tracker = None
            lines = str(error).strip().splitlines() or [""]
            text = (
                f"the log {self.where} broke, and the run goes on without it: {type(error).__name__}: {lines[0][:300]}"
            )
            if self.tell is not None:
                self.tell(text)
            else:
                warnings.warn(text, stacklevel=2)

    def _numbers(self, values: Mapping[str, Any], step: int = 0) -> None:
        """Hand on what is a finite number."""
        assert self._tracker is not None
        plain = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        if finite := {name: value for name, value in plain.items() if math.isfinite(value)}:
            self._tracker.numbers(finite, step)

    def _texts(self, values: Mapping[str, Any]) -> None:
        assert self._tracker is not None
        if texts := {name: str(value) for name, value in values.items() if value not in (None, "")}:
            self._tracker.texts(texts)

    def _requested(self, event: Mapping[str, Any]) -> None:
        assert self._tracker is not None
        if self._begun:
            return
        self._folder = folder = Path(str(event["folder"])).absolute()
        self._tracker.start(folder.name, parameters(event))
        self._begun = True
        self._texts({"folder": folder, "source": event.get("source"), "goal": event.get("goal")})

    def _stage(self, event: Mapping[str, Any]) -> None:
        self._texts({"stage": event.get("name")})

    def _source(self, event: Mapping[str, Any]) -> None:
        self._numbers({f"source/{event.get('metric_name') or 'metric'}": event.get("metric")})

    def _progress(self, event: Mapping[str, Any]) -> None:
        label, done, total = str(event.get("label")), int(event.get("done") or 0), int(event.get("total") or 0)
        now = time.monotonic()
        if total and (done >= total or now - self._shown.get(label, -math.inf) >= PROGRESS_EVERY_S):
            self._shown[label] = now
            self._numbers({f"progress/{label}": done / total}, done)

    def _training(self, event: Mapping[str, Any]) -> None:
        name = f"{_trial(event)}training {self._trainings[event.get('trial')]}"
        terms = {f"{name}/{term}": value for term, value in (event.get("terms") or {}).items()}
        values = {f"{name}/loss": event.get("loss"), f"{name}/rate": event.get("rate"), **terms}
        self._numbers(values, int(event.get("step") or 0))

    def _trained(self, event: Mapping[str, Any]) -> None:
        self._trainings[event.get("trial")] += 1

    def _candidate(self, event: Mapping[str, Any]) -> None:
        name = f"{_trial(event)}{event.get('name')}"
        read = {figure: event[figure] for figure in FIGURES if event.get(figure) is not None}
        self._figures[name] = read
        if name == "artifact":  # whose figures stand without a name, so that runs can be sorted by them
            return
        self._numbers({f"{name}/{figure}": value for figure, value in read.items()})
        self._texts({f"{name}/reason": None if event.get("met") else event.get("reason")})

    def _tried(self, event: Mapping[str, Any]) -> None:
        number = int(event.get("number") or 0)
        figures = {f"trials/{name}": value for name, value in (event.get("figures") or {}).items()}
        self._numbers({**figures, "trials/seconds": event.get("seconds")}, number)
        failure = f": {event['failure']}" if event.get("failure") else ""
        self._texts({f"trial {number}": f"{event.get('words')}{failure}"})

    def _warning(self, event: Mapping[str, Any]) -> None:
        self._warnings += 1
        self._texts({f"warning {self._warnings}": event.get("text")})

    def _done(self, event: Mapping[str, Any]) -> None:
        assert self._tracker is not None
        chosen = event.get("chosen")
        self._numbers(self._figures.get("artifact", {}))
        paths = {name: self._folder / name for name in (ARTIFACT, RECORD, REPORT)}
        verdict = {"met": "yes" if event.get("met") else "no", "chosen": chosen, "reason": event.get("reason")}
        self._texts({**verdict, **paths})
        self._tracker.end(None)
        self._tracker = None


_HANDLERS: dict[str, Callable[[Log, Mapping[str, Any]], None]] = {
    "requested": Log._requested,
    "stage": Log._stage,
    "source": Log._source,
    "progress": Log._progress,
    "training": Log._training,
    "trained": Log._trained,
    "candidate": Log._candidate,
    "figures": Log._candidate,
    "tried": Log._tried,
    "warning": Log._warning,
    "done": Log._done,
}
_WITHIN = ("training", "trained", "candidate", "figures")  # what is kept of the trials of a search


def _trial(event: Mapping[str, Any]) -> str:
    """What names begin with that belong to a trial of a search."""
    return f"trial {event['trial']}/" if "trial" in event else ""


def parameters(event: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, flat: the recipe's settings stand as ``1 quantize.Static.weight_bits``."""
    flat = {k: v for k, v in event.items() if k not in ("time", "kind", "folder", "recipe") and v is not None}
    for number, step in enumerate(event.get("recipe") or (), 1):
        flat |= {f"{number} {path}": value for path, value in settings_of(step).items() if value is not None}
    simple: dict[str, Any] = {}
    for key, value in flat.items():
        if isinstance(value, Mapping):
            simple |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            simple[key] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return simple


def open_log(where: str, tell: Callable[[str], None] | None = None) -> Log:
    """Open a log, and ask whether it can be written to.

    Args:
        where: ``mlflow:URI``, ``tensorboard:DIR`` or ``wandb:PROJECT``.
        tell: As of `Log`.

    Raises:
        UsageError: It is none of these.
        MissingDependency: The tracker's package is not installed.
        OutputError: It can't be written to, or a server does not answer within ten seconds.
    """
    kind, _, place = where.partition(":")
    if kind not in KINDS or not place:
        raise UsageError(
            "a log is a kind and a place", code="log", field="log", got=repr(where)[:300], expected=_EXAMPLES
        )
    module = importlib.import_module(f"penjing.watch.{kind}")
    return Log(where, module.open_tracker(place), tell)


@contextlib.contextmanager
def logging(logs: str | Sequence[str], listeners: Sequence[Listener] = ()) -> Iterator[tuple[Listener, ...]]:
    """The listeners with a log for every place, which are closed at the end; see `open_log`.

    A log that breaks is told to the other listeners, as an event of kind "warning".
    """

    def tell(text: str) -> None:
        for listener in listeners:
            listener({"kind": "warning", "text": text})
        if not listeners:
            warnings.warn(text, stacklevel=2)

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_log(where, tell)) for where in ([logs] if isinstance(logs, str) else logs)]
        yield (*listeners, *opened)
