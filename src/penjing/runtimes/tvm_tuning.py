"""Schedules of TVM: sampled from its own space, timed on this machine, the best kept on disk for every later build.

The space is that of MetaSchedule (Shao et al., "Tensor Program Optimization with Probabilistic Programs", 2022). It is
sampled at random, without its learned cost model, which needs another package: few samples of a convolution are enough
to be far from the schedule that TVM starts from. The time is shared out by what the operators take.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penjing.records import reading
from penjing.records.files import cache, write_text

SAMPLES = 64  # of one operator's schedules, at most
_BATCH = 4
_TOLERANCE = 1e-4  # of the largest value: sums in another order differ by less
_TIMED_S = 0.004  # one timing, of which the best of three counts
# Of other devices. Reading them takes over a minute where torch is imported, for every one asks who its caller was.
_OTHERS = ("cuda", "rocm", "metal", "hexagon", "riscv_cpu")


@dataclass
class _Operator:
    """A fused operator of the network.

    Attributes:
        key: Of its best schedule on disk.
        module: The operator alone, as TVM starts from it.
        name: What TVM calls it.
        weight: How often it is called.
        best: The module with its best schedule.
        seconds: Of a call with that schedule.
        sampled: How many schedules were timed, now and before.
    """

    key: str
    module: Any
    name: str
    weight: int
    best: Any
    seconds: float = float("inf")
    sampled: int = 0


def build(path: str, library: str, budget: float | None, threads: int) -> str:
    """Compile a Relax module with its best schedules into a shared library; returns what the processor is called.

    Args:
        path: The module in JSON.
        library: The file to write.
        budget: Seconds of tuning; what was tuned before is on disk. None: as TVM starts, nothing timed, nothing read.
        threads: That the artifact will have; schedules are chosen for them.
    """
    import tvm

    from penjing.runtimes.tvm import processor

    name = processor()
    target = tvm.target.Target({"kind": "llvm", "mcpu": name, "num-cores": threads})
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    with target, _quiet():
        module = _lowered(Path(path).read_text(encoding="utf-8"))
        if budget is not None:
            _tune(module, target, budget)
        tvm.compile(module, target=target).export_library(library)
    return name


def _lowered(text: str) -> Any:
    """A Relax module in JSON, in fused operators of loops."""
    import tvm
    from tvm import relax

    transform = relax.transform
    passes = [
        transform.DecomposeOpsForInference(),
        transform.CanonicalizeBindings(),
        transform.FoldConstant(),
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FoldConstant(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
    ]
    return tvm.transform.Sequential(passes)(tvm.ir.load_json(text))


def _tune(module: Any, target: Any, budget: float) -> None:
    """Give the operators of a module their best schedules, in place."""
    schedules = _import()
    operators = _operators(schedules, module, target)
    if any(operator.seconds == float("inf") for operator in operators):
        return  # one that can't be built is refused when all are compiled: no time goes into the others
    end = time.monotonic() + budget
    sources = {o.key: _samples(schedules, o, target) for o in operators if o.sampled < SAMPLES}
    while sources and time.monotonic() < end:
        # The one that takes most time for every sample that it has had.
        worst = max(
            (o for o in operators if o.key in sources), key=lambda o: o.weight * o.seconds / (1 + o.sampled // _BATCH)
        )
        if not _improve(worst, sources[worst.key], target, end):
            del sources[worst.key]
    for operator in operators:
        _store(operator)
        _apply(module, operator)


def _improve(operator: _Operator, samples: Iterator[Any], target: Any, end: float) -> bool:
    """Time some more schedules of an operator; whether there may be others."""
    for _ in range(_BATCH):
        candidate = next(samples, None)
        if candidate is None:
            return False
        operator.sampled += 1
        seconds = _timed(candidate, target, 3 * operator.seconds)
        if seconds < operator.seconds and _equal(operator, candidate, target):
            operator.seconds, operator.best = seconds, candidate
        if time.monotonic() >= end:
            break
    return operator.sampled < SAMPLES


def _operators(schedules: Any, module: Any, target: Any) -> list[_Operator]:
    """The operators of a module without varying sizes, each with its best schedule so far."""
    operators = []
    for task in schedules.relax_integration.extract_tasks(module, target, {}):
        alone = task.dispatched[0]
        key = hashlib.sha256(f"{_text(alone)} {target} {_version()}".encode()).hexdigest()[:32]
        operator = _Operator(key, alone, str(task.task_name), int(task.weight), alone)
        _recall(operator)
        if operator.best is not alone and not _equal(operator, operator.best, target):
            operator.best = alone
        operator.seconds = _timed(operator.best, target, 10.0)
        operators.append(operator)
    return operators


def _samples(schedules: Any, operator: _Operator, target: Any) -> Iterator[Any]:
    """Schedules of an operator, sampled from its space; those that were timed before are not taken again."""
    context = schedules.TuneContext(
        mod=operator.module,
        target=target,
        space_generator="post-order-apply",
        search_strategy="replay-trace",
        task_name=operator.name,
        rand_state=1 + operator.sampled,
        num_threads=1,
    )
    context.pre_tuning(
        max_trials=SAMPLES,
        num_trials_per_iter=_BATCH,
        design_spaces=context.generate_design_space(),
        database=None,
        cost_model=None,
    )
    result = schedules.runner.RunnerResult([1.0], None)  # the strategy replays at random: it needs no times
    while (candidates := context.generate_measure_candidates()) is not None:
        yield from (candidate.sch.mod for candidate in candidates)
        context.notify_runner_results(candidates, [result] * len(candidates))


def _timed(module: Any, target: Any, limit: float) -> float:
    """Seconds of a call: the best of three timings, or the first that is over `limit`; infinite without a build."""
    import tvm

    try:
        function = tvm.tirx.build(module, target=target)[_entry(module)]
        arguments = _arguments(module)
        first = _call(function, arguments, 1)
        if first > limit:
            return first
        first = _call(function, arguments, 1)
        calls = max(1, int(_TIMED_S / max(first, 1e-7)))
        return min(_call(function, arguments, calls) for _ in range(3))
    except Exception:  # a sample that LLVM or TVM does not take is one sample less
        logging.getLogger(__name__).debug("a schedule can't be built", exc_info=True)
        return float("inf")


def _equal(operator: _Operator, module: Any, target: Any) -> bool:
    """Whether a schedule computes what the operator does: not all that TVM samples do, and a file may be damaged."""
    try:
        expected, answers = (_answers(m, target) for m in (operator.module, module))
    except Exception:  # it can't be built, or takes other arguments
        logging.getLogger(__name__).debug("a schedule can't be compared", exc_info=True)
        return False
    return [x.shape for x in expected] == [x.shape for x in answers] and all(
        np.abs(a - b).max(initial=0.0) <= _TOLERANCE * np.abs(a).max(initial=0.0)
        for a, b in zip(expected, answers, strict=True)
    )


def _answers(module: Any, target: Any) -> list[np.ndarray]:
    """All arguments of an operator after two calls, what it wrote among them."""
    import tvm

    function, arguments = tvm.tirx.build(module, target=target)[_entry(module)], _arguments(module)
    for _ in range(2):
        function(*arguments)
    return [x.numpy().astype(np.float64) for x in arguments]


def _call(function: Callable[..., Any], arguments: list[Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    return (time.perf_counter() - start) / calls


def _arguments(module: Any) -> list[Any]:
    import tvm
    from tvm.s_tir.meta_schedule.arg_info import ArgInfo

    generator = np.random.default_rng(0)
    return [
        tvm.runtime.tensor(np.abs(generator.standard_normal([int(n) for n in info.shape])).astype(str(info.dtype)))
        for info in ArgInfo.from_entry_func(module, False)
    ]


def _entry(module: Any) -> str:
    return str(next(iter(module.functions)).name_hint)


def _apply(module: Any, operator: _Operator) -> None:
    """Put an operator's best schedule in every place where it is called."""
    import tvm
    import tvm_ffi

    plain = operator.module[_entry(operator.module)]
    tuned = operator.best[_entry(operator.best)]
    for variable, function in list(module.functions.items()):
        if isinstance(function, tvm.tirx.PrimFunc) and tvm_ffi.structural_equal(
            _bare(function), _bare(plain), map_free_vars=True
        ):
            module[variable] = tuned.with_attr("global_symbol", variable.name_hint)


def _bare(function: Any) -> Any:
    """A function without what it is called."""
    for name in function.attrs.keys() if function.attrs else ():
        function = function.without_attr(name)
    return function


def _text(module: Any) -> str:
    import tvm

    return str(tvm.ir.save_json(module))


def _file(key: str) -> Path:
    return cache("tvm") / f"{key}.json"


def _recall(operator: _Operator) -> None:
    """Take the best schedule that is on disk, if there is one; a damaged file is as none."""
    import tvm

    path = _file(operator.key)
    try:
        data = reading.json_file(path)
        best, sampled = tvm.ir.load_json(data["module"]), int(data["sampled"])
        _entry(best)
    except FileNotFoundError:
        return
    except Exception:  # TVM raises errors of its own
        logging.getLogger(__name__).debug("a stored schedule can't be read", exc_info=True)
        return
    operator.best, operator.sampled = best, min(max(sampled, 0), SAMPLES)


def _store(operator: _Operator) -> None:
    write_text(_file(operator.key), json.dumps({"sampled": operator.sampled, "module": _text(operator.best)}))


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("apache-tvm")


def _import() -> Any:
    """MetaSchedule, without the instructions of other devices."""
    for name in _OTHERS:
        sys.modules.setdefault(f"tvm.s_tir.tensor_intrin.{name}", types.ModuleType(name))
    from tvm.s_tir import meta_schedule

    return meta_schedule


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
