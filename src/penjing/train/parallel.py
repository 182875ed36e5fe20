"""Data-parallel training on a Ray cluster: every worker computes the gradient of its part of each batch.

The parts' gradients are summed, weighted by their samples, so that the step is that of the whole batch: Goyal et al.,
"Accurate, Large Minibatch SGD", 2017, section 2.3. Batch norms see their worker's part alone, as there, and their
running statistics are averaged over all workers after every update; losses that compare samples with each other, with
the size of a batch's values (hints), or divide by how many labels there are, do so within one part.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed, fx, nn
from torch.utils import _pytree as pytree

from penjing.errors import OutputError, PenjingError, TrainingError
from penjing.network.portable import Portable
from penjing.steps.step import Context
from penjing.tasks.calibration import Dynamic
from penjing.tasks.call import Call
from penjing.train import cluster as cluster_of
from penjing.train.sharing import part

STATE = "finetune.pt"


@dataclass(frozen=True)
class Group:
    """The group of workers of one training, as seen by one of them; with one worker all methods are no-ops.

    Attributes:
        rank: Number of this worker.
        size: How many there are.
        saved: Called by the first worker with the path of a state that it has saved.
    """

    rank: int = 0
    size: int = 1
    saved: Callable[[Path], None] = lambda path: None

    def part(self, call: Call, target: Any, dynamic: Dynamic = None) -> tuple[Call, Any, float]:
        """This worker's samples of a batch, and their fraction of the batch; it may have none.

        Args:
            call: The inputs.
            target: Its first axis are the samples.
            dynamic: Axes of the inputs that vary, see `penjing.train.sharing.part`.

        Raises:
            TaskError: Something in the batch has another number of samples, or is a list with an entry a sample.
        """
        if self.size == 1:
            return call, target, 1.0
        return part(call, target, dynamic, self.rank, self.size)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the workers' gradients in place; a parameter without a gradient on any worker stays without one."""
        if self.size == 1:
            return
        every = [p for p in parameters if p.requires_grad]
        has = torch.tensor([p.grad is not None for p in every], dtype=torch.int32)
        distributed.all_reduce(has, distributed.ReduceOp.MAX)
        some = [p for p, yes in zip(every, has.tolist(), strict=True) if yes]
        if not some:
            return
        for p, gradient in zip(some, _summed([_gradient(p) for p in some]), strict=True):
            p.grad = gradient.to(p.dtype)

    def sum(self, value: float) -> float:
        """The sum of a number over all workers."""
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        distributed.all_reduce(total)
        return float(total)

    def first(self, value: int) -> int:
        """The first worker's value."""
        if self.size == 1:
            return value
        told = torch.tensor([value])
        distributed.broadcast(told, 0)
        return int(told)

    def each(self, state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Every worker's tensors, in the order of their numbers."""
        if self.size == 1:
            return [state]
        states: list[Any] = [None] * self.size
        distributed.all_gather_object(states, state)
        return states

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Average tensors over all workers, in place."""
        every = list(tensors) if self.size > 1 else []
        if not every:
            return
        for t, total in zip(every, _summed(every), strict=True):
            t.copy_(total / self.size)


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)


def _summed(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each summed over all workers, in 32 bits, or in 64 where one of them has as many."""
    exact = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    flat = torch.cat([t.reshape(-1).to(exact) for t in tensors])
    distributed.all_reduce(flat)
    parts = torch.split(flat, [t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]


Work = Callable[[nn.Module, Context, Any, Group], nn.Module]


def spread(work: Work, network: nn.Module, context: Context, settings: Any, cluster: str, workers: int) -> None:
    """Train `network` in place on `workers` workers of a Ray cluster.

    Args:
        work: What each worker does: a function of a module, with network, context, settings and group.
        network: It has the trained weights at the end.
        context: Its events are told here, and its folder is written here.
        settings: Handed to `work`.
        cluster: "local" starts Ray on this machine; else an address that `ray.init` takes.
        workers: How many processes.

    Raises:
        MissingDependency: Ray is not installed.
        TaskError: Something of the task or the settings can't be sent to another process.
        TrainingError: The cluster can't be reached, or a worker failed.
    """
    ray = cluster_of.ray()
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    saved = context.folder / STATE if context.folder else None
    data = cluster_of.pickled(
        {
            "work": work,
            "network": _portable(network),
            "context": Context(task=context.task, seed=context.seed, device=context.device),
            "source": _portable(context.source),
            "settings": replace(settings, teacher=None),
            "teacher": pytree.tree_map(_portable, settings.teacher),
            "state": saved.read_bytes() if saved is not None and saved.exists() else None,
            "keeps": saved is not None,
        }
    )
    with cluster_of.connected(cluster, workers):
        cuda = torch.device(context.device).type == "cuda"
        cluster_of.check_room(ray.cluster_resources(), workers, cuda)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as aside:
            queue = Queue()
            trainer = TorchTrainer(
                _worker,
                train_loop_config={"data": ray.put(data), "queue": queue, "at": os.getcwd(), "path": sys.path},
                torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cuda else "gloo"),
                scaling_config=ScalingConfig(num_workers=workers, use_gpu=cuda),
                run_config=RunConfig(storage_path=aside, name="penjing"),
            )
            _listen(trainer, queue, network, context, saved)


def _listen(trainer: Any, queue: Any, network: nn.Module, context: Context, saved: Path | None) -> None:
    """Take what the workers say until they are done."""
    from ray.util.queue import Empty

    failed: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # told below, in the thread that waits
            failed.append(error)

    running = threading.Thread(target=fit, daemon=True)
    running.start()
    trained = None
    while running.is_alive() or not queue.empty():
        try:
            kind, value = queue.get(timeout=0.2)
        except Empty:
            continue
        if kind == "event":
            context.events(value[0], **value[1])
        elif kind == "state" and saved is not None:
            _keep(saved, value)
        elif kind == "error":
            raise value
        elif kind == "done":
            trained = value
    if trained is None:
        said = " ".join(str(failed[0]).split())[-300:] if failed else "no result"
        raise TrainingError("a worker of the cluster failed", code="failed", got=said, expected="a trained network")
    network.load_state_dict(torch.load(io.BytesIO(trained), weights_only=True))


def _keep(path: Path, state: bytes) -> None:
    aside = path.with_suffix(".new")
    try:
        aside.write_bytes(state)
        aside.replace(path)
    except OSError as error:
        raise OutputError(
            "the state of the training can't be saved",
            code="unwritable",
            got=f"{error.strerror or error} ({path.parent})",
            expected="a folder with write permission and free space",
            remedy="free some space; what was saved before is untouched",
        ) from error


def _worker(config: dict[str, Any]) -> None:
    """What Ray runs in every process."""
    import pickle

    import ray
    from ray import train

    place, queue = train.get_context(), config["queue"]
    rank = place.get_world_rank()
    sys.path += [folder for folder in config["path"] if folder not in sys.path]
    if os.path.isdir(config["at"]):  # another machine may not have it
        os.chdir(config["at"])  # Ray has changed to a folder of its own, and a data set may name files relatively
    sent = pickle.loads(ray.get(config["data"]))

    def tell(kind: str, **values: Any) -> None:
        if rank == 0:
            queue.put(("event", (kind, values)))

    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) if sent["keeps"] else None
        if sent["state"] is not None and folder is not None:
            (folder / STATE).write_bytes(sent["state"])
        context = replace(sent["context"], events=tell, folder=folder, source=_network(sent["source"]))
        settings = replace(sent["settings"], teacher=pytree.tree_map(_network, sent["teacher"]))
        group = Group(rank, place.get_world_size(), lambda path: queue.put(("state", path.read_bytes())))
        try:
            trained = sent["work"](_network(sent["network"]), context, settings, group)
        except PenjingError as error:
            queue.put(("error", error))
            raise  # Ray ends the other workers, which wait for this one's gradients
        if rank == 0:
            buffer = io.BytesIO()
            torch.save(trained.state_dict(), buffer)
            queue.put(("done", buffer.getvalue()))


def _portable(value: Any) -> Any:
    return Portable.of(value) if isinstance(value, fx.GraphModule) else value


def _network(value: Any) -> Any:
    return value.network() if isinstance(value, Portable) else value


__all__ = ["Group", "spread"]
