"""What differs between what several runs were given and where they ran: source, data, recipe, machine, versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from penjing.records.record import Record
from penjing.records.runs import RunRow

_DIGITS = 12  # of a hash: enough to tell two apart
ORDER = "order of the steps"
IN_IT = "in it"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that is not the same in all runs.

    Attributes:
        topic: "source", "task", "data", "goal", "recipe", "search", "runtimes", "target", "machine",
            "timing", "versions" or "seed".
        name: What of it; a setting of the recipe as "quantize.Static.weight_bits".
        values: Name of the run → its value, plain data; runs that have none are left out.
    """

    topic: str
    name: str
    values: dict[str, Any]


def differences(runs: Sequence[RunRow]) -> tuple[Difference, ...]:
    """All differences between runs, in the order of a run: what came in first."""
    facts = {run.name: dict(_facts(run.record)) for run in runs}
    recipes = {run.name: run.record.recipe for run in runs}
    rows = [*_of_facts(facts), *_of_recipes(recipes)]
    return tuple(sorted(rows, key=lambda row: _TOPICS.index(row.topic)))  # which leaves the order within a topic


_TOPICS = ("source", "task", "data", "goal", "recipe", "search", "runtimes", "target", "machine", "timing",
           "versions", "seed")  # fmt: skip


def _facts(record: Record) -> Iterator[tuple[tuple[str, str], Any]]:
    source, target, reference = record.source, record.target, record.reference
    yield ("source", "name"), record.name
    yield ("source", "network"), record.files.get("source/model.pt2", "")[:_DIGITS] or None
    yield ("source", "parameters"), source.parameters
    yield ("source", "macs"), source.macs
    yield ("source", "metric"), source.metric
    yield ("source", "reference"), None if reference is None else f"{reference.name} {reference.weights[:_DIGITS]}"
    yield ("task", "name"), record.task
    yield ("task", "metric"), record.metric_name
    yield ("task", "higher is better"), record.higher_is_better
    for role, sha in record.data.items():
        yield ("data", role), sha[:_DIGITS]
    yield ("goal", "text"), record.goal.text
    yield ("search", "trials"), None if record.search is None else len(record.search.trials)
    yield ("search", "minutes"), None if record.search is None else record.search.minutes
    yield ("search", "stopped"), None if record.search is None else record.search.stopped
    yield ("runtimes", "tried"), sorted({c.runtime for c in (*record.candidates, *record.rejected)})
    yield ("target", "name"), None if target is None else target.name
    yield ("target", "profile"), None if target is None else target.sha256[:_DIGITS]
    for name, value in asdict(record.machine).items():
        if name != "threads":
            yield ("machine", name), list(value) if isinstance(value, tuple) else value
    latency = source.latency_ms
    yield ("timing", "threads"), record.machine.threads if latency is None else latency.threads
    yield ("timing", "batch"), None if latency is None else latency.batch
    for name, version in {"penjing": record.penjing, **record.versions}.items():
        yield ("versions", name), version
    yield ("seed", "seed"), record.seed


def _of_facts(facts: Mapping[str, Mapping[tuple[str, str], Any]]) -> Iterator[Difference]:
    for topic, name in dict.fromkeys(key for of_run in facts.values() for key in of_run):
        values = {run: value for run, of_run in facts.items() if (value := of_run.get((topic, name))) is not None}
        if _differ(values, len(facts)):
            yield Difference(topic=topic, name=name, values=values)


def _of_recipes(recipes: Mapping[str, Sequence[Any]]) -> Iterator[Difference]:
    """Step by step, and within a step that several have, setting by setting."""
    labels = {run: _labels(recipe) for run, recipe in recipes.items()}
    # A step that one recipe has twice is numbered in all of them.
    often = {name for of_run in labels.values() for name, turn in of_run if turn > 1}
    by_run = {
        run: {f"{name} {turn}" if name in often else name: settings_of(entry) for (name, turn), entry in of_run.items()}
        for run, of_run in labels.items()
    }
    for step in dict.fromkeys(step for steps in by_run.values() for step in steps):
        having = {run: steps[step] for run, steps in by_run.items() if step in steps}
        if len(having) < len(by_run):
            yield Difference(topic="recipe", name=step, values=dict.fromkeys(having, IN_IT))
        for setting in dict.fromkeys(name for settings in having.values() for name in settings):
            # A setting that an older record does not have yet is as one that is not set.
            if _differ({run: settings.get(setting) for run, settings in having.items()}, len(having)):
                values = {run: settings[setting] for run, settings in having.items() if setting in settings}
                yield Difference(topic="recipe", name=f"{step}.{setting}".rstrip("."), values=values)
    shared = set.intersection(*(set(steps) for steps in by_run.values()))
    orders = {run: [step for step in steps if step in shared] for run, steps in by_run.items()}
    if _differ(orders, len(orders)):
        yield Difference(topic="recipe", name=ORDER, values=orders)


def _differ(values: Mapping[str, Any], number: int) -> bool:
    """Whether not all of so many runs have the same value; no value at all is the same."""
    first = next(iter(values.values()), None)
    return bool(values) and (len(values) < number or any(value != first for value in values.values()))


def _labels(recipe: Sequence[Any]) -> dict[tuple[str, int], Any]:
    """The steps of a recipe by their name and how often it came before."""
    seen: Counter[str] = Counter()
    steps = {}
    for entry in recipe:
        name = str(next(iter(entry))) if isinstance(entry, Mapping) and len(entry) == 1 else "step"
        seen[name] += 1
        steps[name, seen[name]] = entry[name] if isinstance(entry, Mapping) and name in entry else entry
    return steps


def settings_of(value: Any, where: str = "") -> dict[str, Any]:
    """The settings of a step, as a recipe has it, by their path; a step within a step is gone into.

    >>> settings_of({"epochs": 2, "clip": [{"Clip": {"norm": 1.0}}], "layers": ["a", "b"], "teacher": None})
    {'epochs': 2, 'clip[0].Clip.norm': 1.0, 'layers': ['a', 'b'], 'teacher': None}
    """
    if isinstance(value, Mapping) and value:
        inner = [(f"{where}.{name}" if where else str(name), part) for name, part in value.items()]
    elif isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
        inner = [(f"{where}[{i}]", part) for i, part in enumerate(value)]
    else:
        return {where: list(value) if isinstance(value, tuple) else value}
    return {path: leaf for name, part in inner for path, leaf in settings_of(part, name).items()}
