"""Progress and messages of the command line, on standard error; results go to standard output."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from penjing.cli import searching
from penjing.records import Diagnosis, Effort, from_dict
from penjing.report import expected
from penjing.report.numbers import metric
from penjing.report.table import legible


class Terminal(Console):
    """A console on which no name from outside moves the cursor, changes a colour or becomes a picture."""

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Let the error through to `main`, where rich would end the process."""
        raise BrokenPipeError

    def render_str(self, text: str, **options: Any) -> Text:
        """Text of a string; its markup is the caller's, who escapes what is not."""
        return super().render_str(legible(text, self.encoding), **options)


class Progressing:
    """Shows events as progress bars with the expected end; on something that is not a terminal, as plain lines."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars: dict[str, TaskID] = {}
        self.covered: set[str] = set()  # a repair that is tried many times says once how far it reaches
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.stage, self.started, self.told = "", time.monotonic(), 0.0

    def __enter__(self) -> Progressing:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["kind"]
        if kind == "progress":
            self._advance(event)
        elif "trial" in event:
            return  # what happens within one of many: the trial's own line tells how it ended
        elif kind in ("search", "trial", "tried"):
            for line in searching.lines(event):
                self.console.print(line, highlight=False, markup=False)
        elif kind == "stage":
            self.stage = event["name"]
            self.console.print(
                f"[dim]{time.monotonic() - self.started:6.1f} s[/dim]  {escape(self.stage)}", highlight=False
            )
        elif kind == "source" and event["metric"] is not None:
            value = metric(event["metric"], event["metric_name"])
            name = escape(event["metric_name"])
            text = f"source {name} [bold]{escape(value)}[/bold]: as you expect? (if not, stop here: Ctrl-C)"
            self.console.print(text, highlight=False)
        elif kind == "diagnosis":
            for line in expected.brief(from_dict(Diagnosis, _values(event))):
                self.console.print(f"          {line}", highlight=False, markup=False)
        elif kind == "effort":
            text = expected.effort(from_dict(Effort, _values(event)))
            self.console.print(f"          {text}", highlight=False, markup=False)
        elif kind == "candidate" and event["metric"] is not None:
            self.console.print(f"          {event['name']}: {event['metric']:.4f}", highlight=False, markup=False)
        elif kind == "warning":
            self.console.print(f"warning: {event['text']}", style="yellow", markup=False)
        elif kind == "remedy":
            word = "kept" if event["kept"] else "no gain"
            text = f"          {event['name']}: {event['snr_db']:.1f} dB on held-out samples, {word}"
            self.console.print(text, highlight=False, markup=False)
        elif kind == "rollback":
            text = f"          {event['returned']} operators in floating point: {event['snr_db']:.1f} dB"
            self.console.print(text, highlight=False)
        elif kind == "rolled_back":
            self.console.print(f"          {event['site']}: {event['reason']}", highlight=False, markup=False)
        elif kind == "decomposed":
            shown = [f"{name}: {reason}" for name, reason in list(event["refused"].items())[:3]]
            more = len(event["refused"]) - len(shown)
            text = f"          {len(event['layers'])} layers decomposed, {event['macs']:.0%} of the MACs"
            stay = f"; these stay: {', '.join(shown)}{f' and {more} more' if more else ''}" if shown else ""
            self.console.print(text + stay, highlight=False, markup=False)
        elif kind == "covered":
            text = f"          {event['step']} covers {event['layers']} of {event['total']} layers"
            if text not in self.covered:
                self.console.print(text, highlight=False, markup=False)
            self.covered.add(text)
        elif kind == "resumed":
            self.console.print(
                f"          kept: {event.get('candidate') or event.get('step')}", highlight=False, markup=False
            )

    def _advance(self, event: dict[str, Any]) -> None:
        label, done, total = (
            legible(str(event["label"]), self.console.encoding),
            int(event["done"]),
            int(event["total"]),
        )
        if self.console.is_terminal:
            if label not in self.bars:
                self.bars[label] = self.progress.add_task(label, total=total)
            loss = f"  loss {event['loss']:.4f}" if "loss" in event else ""
            self.progress.update(self.bars[label], completed=done, total=total, description=f"{label}{loss}")
            if done >= total:
                self.progress.remove_task(self.bars.pop(label))
        elif time.monotonic() - self.told > 10:  # a log file: a line every ten seconds
            self.told = time.monotonic()
            self.console.print(f"          {label} {done}/{total}", highlight=False, markup=False)


def _values(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in ("kind", "time")}
