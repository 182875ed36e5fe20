"""The command line. Results go to standard output, progress and messages to standard error.

Exit codes: 0 done and goal met, 1 error, 2 usage, 3 finished but goal not met (or evidence that does not hold).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.markup import escape
from rich.table import Table

from penjing.allocator import reused_memory
from penjing.cli import blockers, comparing, devices, installed, packing, quantizing, sources, updating
from penjing.cli.console import Terminal
from penjing.cli.grammar import parser
from penjing.cli.inspecting import (
    show_activations,
    show_branches,
    show_device,
    show_diagnosis,
    show_floats,
    show_gains,
    show_group,
    show_sensitivity,
)
from penjing.errors import OutputError, PenjingError, UsageError
from penjing.tasks.usercode import never_exiting

if TYPE_CHECKING:
    from penjing.pipeline.inspection import Inspection
    from penjing.recipes.recipe import Recipe

MET, ERROR, USAGE, NOT_MET = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = parser(COMMANDS).parse_args(arguments)
    messages = Terminal(stderr=True)
    try:
        with _stopped_as_by_hand(), never_exiting(), reused_memory():
            return int(parsed.command(parsed, messages))
    except PenjingError as error:
        return _told(error, parsed, messages)
    except KeyboardInterrupt:
        can_resume = hasattr(parsed, "resume")
        messages.print("stopped" + ("; `--resume` continues from here" if can_resume else ""), style="yellow")
        return ERROR
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except OSError as error:
        full = OutputError(
            "a file can't be read or written",
            code="unwritable",
            got=f"{type(error).__name__}: {error}",
            expected="permission, and free space in the run folder and the folder for temporary files",
            remedy="free some space, or set TMPDIR to another folder",
        )
        return _told(full, parsed, messages)


@contextlib.contextmanager
def _stopped_as_by_hand() -> Iterator[None]:
    """SIGTERM is Ctrl-C: what was begun is tidied up, and no process is left behind."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def entry() -> None:
    """What the installed script calls."""
    sys.exit(main())


def _told(error: PenjingError, parsed: argparse.Namespace, messages: Terminal) -> int:
    if parsed.json:
        print(json.dumps({"error": type(error).__name__, **_plain_error(error)}, indent=2))
    messages.print(f"[bold red]{type(error).__name__}[/bold red]: ", end="")
    messages.print(str(error), markup=False, highlight=False, soft_wrap=True)
    return error.exit_code


def _plain_error(error: PenjingError) -> dict[str, Any]:
    return {
        "code": error.code,
        "field": error.field,
        "what": error.what,
        "got": None if error.got is None else str(error.got),
        "expected": None if error.expected is None else str(error.expected),
        "remedy": error.remedy,
    }


def _compress(parsed: argparse.Namespace, messages: Terminal) -> int:
    sources.check_files(parsed)
    from penjing.goals.goal import Goal
    from penjing.report import expected, table, verdict
    from penjing.search.compress import compress
    from penjing.tasks.opening import open_task

    goal = Goal.parse(parsed.goal) if parsed.goal is not None else None
    recipe = _recipe(parsed.recipe) if parsed.recipe else None
    task = open_task(parsed.task)
    from penjing.cli.console import Progressing

    with Progressing(messages) as progress:
        result = compress(
            sources.source(parsed),
            task,
            goal,
            minutes=parsed.minutes,
            trials=parsed.trials,
            study=parsed.study,
            cluster=parsed.cluster,
            runtime=parsed.runtime,
            recipe=recipe,
            out=parsed.out,
            seed=parsed.seed,
            threads=parsed.threads,
            batch=parsed.batch,
            device=parsed.device,
            exclude=parsed.exclude,
            seconds=parsed.seconds,
            resume=parsed.resume,
            force=parsed.force,
            listeners=[progress],
            log=parsed.log,
            target=parsed.target,
        )
    record = result.record
    if parsed.json:
        print(json.dumps(dataclasses.asdict(record), indent=2))
    else:
        out = Terminal()
        out.print(table.candidates(record))
        out.print(table.comparison(record))
        word = "[bold green]goal met[/bold green]" if result.met else "[bold yellow]goal not met[/bold yellow]"
        out.print(f"{word}: ", end="")
        out.print(record.goal.reason, markup=False, highlight=False)
        out.print(verdict.of(record).headline, markup=False, highlight=False)
        for line in expected.after(record):
            out.print(line, markup=False, highlight=False)
        for name in ("artifact", "load.py", "record.json", "report.html"):
            out.print(f"  {result.folder / name}", highlight=False, soft_wrap=True, markup=False)
    return MET if result.met else NOT_MET


def _inspect(parsed: argparse.Namespace, messages: Terminal) -> int:
    sources.check_files(parsed)
    inspection = _inspected(parsed, messages)
    code = MET if inspection.runs else NOT_MET
    if parsed.json:
        print(json.dumps(dataclasses.asdict(inspection), indent=2))
        return code
    from penjing.report import table
    from penjing.report.numbers import figure

    out = Terminal()
    out.print(table.layers(inspection.layers))
    out.print(table.chart(inspection.layers))
    out.print(
        f"{inspection.name}: {figure(inspection.parameters, 'count')} parameters, {figure(inspection.macs, 'MACs')}, "
        f"{figure(inspection.peak_activation_bytes, 'bytes')} of activations at the peak (batch 1)",
        highlight=False,
        markup=False,
    )
    show_activations(inspection, out)
    if parsed.group:
        return show_group(inspection, parsed, out)
    if inspection.sensitivity:
        return show_sensitivity(inspection, parsed, out)
    out.print("\n[bold]coupled channels[/bold]")
    out.print(table.groups(inspection.groups, inspection.not_prunable))
    show_branches(inspection, out)
    show_gains(inspection, out)
    show_floats(inspection, out)
    show_diagnosis(inspection, out)
    if inspection.noise:
        out.print(f"\n[bold]INT8 in {parsed.noise}[/bold]: noise of the outputs when a single operator is quantized")
        out.print(table.noise(inspection.noise))
    show_device(inspection, parsed.target, out)
    for text in blockers.lines(inspection.refused):
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    return code


def _inspected(parsed: argparse.Namespace, messages: Terminal) -> Inspection:
    """The inspection of the source that was named, with a task, a shape, or its own example."""
    from penjing.cli.console import Progressing
    from penjing.pipeline.inspection import inspect
    from penjing.records.events import Events
    from penjing.sources.source import open_source, with_declared_axes
    from penjing.tasks.opening import open_task
    from penjing.tasks.task import Task

    task = open_task(parsed.task) if parsed.task else None
    if parsed.shape:
        import torch

        task = Task(example=torch.zeros(1, *parsed.shape))
    source = open_source(sources.source(parsed), task=task)
    if task is None:
        if source.example is None:
            raise UsageError(
                "inspecting this source needs an example input",
                code="no-example",
                got="neither --task nor --shape"
                + (f", and axes without a size: {'; '.join(source.inputs)}" if source.inputs else ""),
                expected="--shape 3,224,224 (one sample, without the batch; of a text its length), or --task",
                remedy="several inputs need a task" if len(source.inputs) > 1 else None,
            )
        task = Task(example=source.example)
    task = with_declared_axes(source, task)
    asked = blockers.asked(parsed.runtime, parsed.save_failing)
    if not (parsed.noise or parsed.sensitivity or asked):
        with messages.status("exporting and analysing"):
            return inspect(source, task, target=parsed.target)
    sensitivity_file = Path(parsed.sensitivity) if parsed.sensitivity else None
    with Progressing(messages) as progress:
        events, failing = (
            Events(listeners=(progress,)),
            Path(parsed.save_failing) if parsed.save_failing is not None else None,
        )
        return inspect(
            source,
            task,
            parsed.noise,
            events,
            sensitivity_file,
            asked=asked,
            save_failing=failing,
            target=parsed.target,
        )


def _measure(parsed: argparse.Namespace, messages: Terminal) -> int:
    from penjing.cli.console import Progressing
    from penjing.pipeline.comparison import measure_artifact
    from penjing.records.events import Events
    from penjing.tasks.opening import open_task

    task = open_task(parsed.task) if parsed.task else None
    with Progressing(messages) as progress:
        rows = measure_artifact(
            parsed.artifact,
            against=parsed.against,
            weights=parsed.weights,
            ignore=parsed.ignore_weights,
            task=task,
            batch=parsed.batch,
            threads=parsed.threads,
            seconds=parsed.seconds,
            events=Events(listeners=(progress,)),
        )
    if parsed.json:
        print(json.dumps({name: dataclasses.asdict(row) for name, row in rows.items()}, indent=2))
        return MET
    from penjing.report.table import measurements

    Terminal().print(measurements(rows))
    return MET


def _verify(parsed: argparse.Namespace, messages: Terminal) -> int:
    from penjing.cli.console import Progressing
    from penjing.pipeline.verify import verify
    from penjing.records.events import Events
    from penjing.tasks.opening import open_task

    task = open_task(parsed.task) if parsed.task else None
    with Progressing(messages) as progress:
        checks = verify(
            parsed.folder,
            task,
            threads=parsed.threads,
            seconds=parsed.seconds,
            events=Events(listeners=(progress,)),
        )
    failed = [c for c in checks if c.holds is False]
    if parsed.json:
        print(json.dumps([dataclasses.asdict(c) for c in checks], indent=2))
    else:
        table = Table("figure", "recorded", "now", "", title=escape(str(parsed.folder)))
        for c in checks:
            word = {True: "[green]holds[/green]", False: "[bold red]differs[/bold red]", None: "[dim]-[/dim]"}[c.holds]
            note = f"\n[dim]{escape(c.note)}[/dim]" if c.note else ""
            table.add_row(escape(c.figure), escape(c.recorded), escape(c.found) + note, word)
        out = Terminal()
        out.print(table)
        held = sum(c.holds is True for c in checks)
        out.print(f"{held} of {held + len(failed)} figures hold" + ("" if task else "; the metric needs --task"))
    return NOT_MET if failed else MET


def _targets(parsed: argparse.Namespace, messages: Terminal) -> int:
    from penjing.cli import profiles

    return profiles.targets(parsed, messages)


def _recipe(name: str) -> Recipe:
    """A recipe by its name, or from a file."""
    from penjing import recipes
    from penjing.recipes.recipe import Recipe
    from penjing.records import reading
    from penjing.records.yaml_text import RECIPE_BYTES

    if name in recipes.NAMES:
        return recipes.NAMES[name]()
    try:
        text = reading.text(name, RECIPE_BYTES)
    except OSError as error:
        near = difflib.get_close_matches(name.replace("_", "-"), recipes.NAMES, n=1)
        raise UsageError(
            "the recipe can't be read",
            code="unreadable",
            got=f"{name}: {error.strerror}",
            expected=f"a YAML file, or one of {', '.join(recipes.NAMES)}",
            remedy=f"did you mean {near[0]}?" if near else None,
        ) from None
    except ValueError as error:
        raise UsageError(
            "the recipe can't be read", code="unreadable", got=f"{name}: {error}", expected="a YAML file in UTF-8"
        ) from None
    return Recipe.from_yaml(text)


COMMANDS = {
    "compress": _compress,
    "inspect": _inspect,
    "quantize": quantizing.quantize,
    "measure": _measure,
    "verify": _verify,
    "compare": comparing.compare,
    "pack": packing.pack,
    "unpack": packing.unpack,
    "delta": updating.delta,
    "patch": updating.patch,
    "bench": devices.bench,
    "record": devices.record,
    "runtimes": installed.runtimes,
    "targets": _targets,
}
