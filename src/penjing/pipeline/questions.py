"""Checks of the user's metric: its direction, whether it calls the network, and whether the data stay the same.

What its name says is asked before anything costly; what only its figures say is told in a warning.
"""

from __future__ import annotations

import copy
import hashlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx

from penjing.errors import TaskError
from penjing.pipeline.metrics import metric_of
from penjing.pipeline.run import Run
from penjing.randomness import preserve_rng_state
from penjing.report import numbers
from penjing.tasks.outputs import numpy_predictor
from penjing.tasks.task import Task, fingerprint
from penjing.tasks.witness import Witness

_LOWER = frozenset(
    "loss losses logloss error errors err wer cer mer ter eer ser mae mse rmse nrmse rmsle msle mape smape nme nmse "
    "perplexity ppl nll bpc bpb bpd fid kid lpips brier ece entropy crossentropy divergence epe ade fde mcd hter far "
    "frr distance chamfer hausdorff levenshtein deviation residual regret".split()
)
_HIGHER = frozenset(
    "accuracy accuracies acc f1 f2 fscore auc auroc auprc roc iou miou jaccard map map50 ap mar dice bleu rouge meteor "
    "chrf psnr ssim sdr sisdr snr pesq stoi recall precision agreement similarity correlation pearson spearman kappa "
    "mcc r2 ndcg mrr hits sensitivity specificity".split()
)
_TURNED = frozenset("neg negative negated minus inverse inverted reciprocal free reduction improvement gain".split())
_INSISTS = re.compile(r"\b(higher|larger|bigger|more|lower|smaller|less)[ _-]is[ _-]better\b", re.IGNORECASE)
_MINUS = re.compile(r"\s*(1(\.0)?\s*)?[-−]\s*[a-z]", re.IGNORECASE)  # "-loss", "1 - WER"


@dataclass(frozen=True)
class Doubt:
    """Why a metric may not say what the goal takes it for.

    Attributes:
        short: A few words for the verdict.
        text: The whole question, with the remedy.
    """

    short: str
    text: str


CHEAP_SECONDS = 10.0  # a metric that took longer on the source is not read once more for a question
BEYOND = 0.01  # of the source's metric: by how much a network that was destroyed has to be better


def says_higher(name: str) -> bool | None:
    """What a metric's name says: True where higher is better, False where lower is, None where it says nothing.

    >>> [says_higher(name) for name in ("word error rate", "valLoss", "top1_accuracy", "negative loss", "1 - WER")]
    [False, False, True, None, None]
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = {word.lower() for text in (name, spaced) for word in re.findall(r"[^\W_]+", text)}
    lower = bool(words & _LOWER)
    higher = bool(words & _HIGHER) or (not lower and bool(words & {"top1", "top5"}))  # top1 of an accuracy, or an error
    if lower == higher or words & _TURNED or _MINUS.match(name) or _INSISTS.search(name):
        return None
    return higher


def check_direction(task: Task) -> Doubt | None:
    """Ask about a metric whose name says the contrary of `higher_is_better`.

    Returns:
        The question, where only the function's name says so and the metric has none.

    Raises:
        TaskError: The metric's own name says so.
    """
    functions = [f for f in (task.evaluate, task.select) if f is not None]
    if not functions:
        return None
    given = task.higher_is_better
    better = "higher" if given else "lower"
    if says_higher(task.metric_name) is (not given):
        raise TaskError(
            f"is {task.metric_name!r} really better when it is {better}?",
            code="direction",
            got=f"metric_name={task.metric_name!r} and higher_is_better={given}" + (" (the default)" if given else ""),
            expected=f"higher_is_better={not given} for a metric of this name",
            remedy=f"Task(higher_is_better={not given}); where {better} really is better, say so in its name: "
            f"metric_name={f'{task.metric_name}, {better} is better'!r}",
        )
    for function in functions:
        called = str(getattr(function, "__name__", ""))
        if task.metric_name == Task.metric_name and says_higher(called) is (not given):
            return Doubt(
                "its direction",
                f"is the metric really better when it is {better}? It comes from a function called {called!r}, and "
                f"higher_is_better={given}: give Task(metric_name=..., higher_is_better=...)",
            )
    return None


def source_metrics(run: Run, task: Task) -> tuple[dict[str, float | None], dict[str, str], Doubt | None]:
    """The source's metric, once with `evaluate` and once with `select` where the task has it; hashes, and a doubt.

    The hashes are of what each of them showed to the network. A metric that a network with shuffled weights does
    better or just as well is told, where looking is cheap.
    """
    stored = run.folder.read_state("source-metrics")
    if stored is None:
        metrics: dict[str, float | None] = {}
        hashes: dict[str, str] = {}
        shown: dict[str, str] = {}
        seconds: dict[str, float] = {}
        answered = {"evaluate": hashlib.sha256(), "select": hashlib.sha256()}
        with run.costing("evaluate source"):
            for name, function in (("evaluate", task.evaluate), ("select", task.select)):
                metrics[name] = None
                if function is not None:
                    digest = hashlib.sha256()
                    witness = Witness(_hashing(numpy_predictor(run.network), digest, answered[name]))
                    start = time.perf_counter()
                    metrics[name] = metric_of(function, witness, "the source")
                    seconds[name] = time.perf_counter() - start
                    hashes[name], shown[name] = digest.hexdigest(), witness.shown
        name = "select" if task.select is not None else "evaluate"
        doubt = _destroyed(run.network, task, name, metrics[name], seconds.get(name, 0.0), answered[name].digest())
        stored = {"metrics": metrics, "hashes": hashes, "shown": shown, "doubt": asdict(doubt) if doubt else None}
        run.folder.write_state("source-metrics", stored)
    doubt = Doubt(**stored["doubt"]) if stored["doubt"] else None
    if doubt is not None:
        run.warn(doubt.text)
    read: dict[str, float | None] = stored["metrics"]
    return read, stored["hashes"], doubt


def other_data(run: Run, shown: Mapping[str, str | None], looked_at: str) -> Doubt | None:
    """A doubt, told, where `evaluate` (or `select`) showed other samples to an artifact than to the source.

    Args:
        run: Where what the source was shown is kept.
        shown: `Witness.shown` by the artifact's name; None where it was not evaluated.
        looked_at: "evaluate" or "select".
    """
    source = (run.folder.read_state("source-metrics") or {}).get("shown", {}).get(looked_at)
    others = [name for name, samples in shown.items() if samples is not None and samples != source]
    if source is None or not others:
        return None
    counts = [int(str(samples).partition(":")[0]) for samples in (shown[others[0]], source)]
    how = f"{counts[0]} samples, and {counts[1]} to the source" if counts[0] != counts[1] else "with other values"
    doubt = Doubt(
        f"{looked_at} showed it other data than the source",
        f"{looked_at} showed {', '.join(others)} other data than the source ({how}): their metrics do not compare. "
        f"Let it read the same samples every time, in any order, without random numbers",
    )
    run.warn(doubt.text)
    return doubt


def _hashing(predict: Callable[..., Any], shown: Any, answered: Any) -> Callable[..., Any]:
    """`predict`, hashing what it is shown and what it answers, in order."""

    def seen(*args: Any, **kwargs: Any) -> Any:
        shown.update(fingerprint([(args, kwargs)]).encode())
        outputs = predict(*args, **kwargs)
        answered.update(fingerprint([((outputs,), {})]).encode())
        return outputs

    return seen


def _destroyed(
    network: fx.GraphModule, task: Task, name: str, value: float | None, seconds: float, answered: bytes
) -> Doubt | None:
    """Whether shuffled weights make the metric better, or leave it as it is though the answers are others."""
    metric = getattr(task, name)
    ours = task.metric_name.endswith("with the reference")  # agreement: its direction is known
    if metric is None or value is None or seconds > CHEAP_SECONDS or ours:
        return None
    broken = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in broken.parameters():
            order = torch.randperm(weight.numel(), generator=generator)
            weight.copy_(weight.flatten()[order.to(weight.device)].view_as(weight))
    answers = hashlib.sha256()
    try:
        with preserve_rng_state():
            predict = _hashing(numpy_predictor(broken), hashlib.sha256(), answers)
            score = metric_of(metric, predict, "the source with shuffled weights")
    except Exception:  # a network that was broken on purpose may break the metric too
        return None
    now, before = (numbers.metric(v, task.metric_name) for v in (score, value))
    gain = score - value if task.higher_is_better else value - score
    if gain > BEYOND * abs(value):
        better = "higher" if task.higher_is_better else "lower"
        return Doubt(
            "its direction",
            f"is {task.metric_name!r} really better when it is {better}? With its weights shuffled the network has "
            f"{now}, and the source {before}: set Task(higher_is_better={not task.higher_is_better}), or look at "
            f"{name}",
        )
    if score == value and answers.digest() != answered:
        return Doubt(
            "it does not tell the network from one with shuffled weights",
            f"does {name} look at what `predict` answers? With its weights shuffled the network has the same "
            f"{task.metric_name}, {now}. Compute the metric from the answers; where it does, the network is no better "
            f"than chance, and no drop can be seen",
        )
    return None
