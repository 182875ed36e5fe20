"""The outputs of student and teacher on the same batch, and the distillation losses between them.

The losses are in `penjing.distill`; the training loop of `penjing.train` calls them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from penjing.errors import ExportError, PenjingError, SourceError, TaskError
from penjing.modes import in_eval_mode
from penjing.network.capture import capture_network
from penjing.network.weights import fingerprint_by_name
from penjing.randomness import preserve_rng_state
from penjing.sources.source import open_file
from penjing.steps.step import Context
from penjing.surgery.taps import Tapped
from penjing.tasks.outputs import first_output
from penjing.tasks.task import Call, Task
from penjing.tasks.usercode import suggest_file


@dataclass(frozen=True)
class DistillationInputs:
    """The inputs of a distillation loss: student and teacher on the same batch.

    Attributes:
        student: The student's output.
        teacher: The teacher's, without gradients.
        target: The labels, or None.
        student_features: Intermediate features of the student, by name.
        teacher_features: Intermediate features of the teacher, by name.
        done: Fraction of the training that is done, from 0 to 1.
    """

    student: Any
    teacher: Any
    target: Any
    student_features: Mapping[str, torch.Tensor]
    teacher_features: Mapping[str, torch.Tensor]
    done: float = 1.0

    def logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first output of both with the classes last, (…, classes) each; see `axis`.

        Raises:
            TaskError: The two differ in shape, or are not classes.
        """
        student, teacher = first_output(self.student), first_output(self.teacher)
        if student.shape != teacher.shape:
            raise TaskError(
                "student and teacher have different outputs",
                code="outputs",
                got=f"{tuple(student.shape)} and {tuple(teacher.shape)}",
                expected="the same classes in the same order",
                remedy="distil from a teacher with other classes by its features alone, for example distill.Hints",
            )
        axis = self.axis(student)
        if student.dim() < 2 or student.shape[axis] < 2:
            raise TaskError(
                "this distillation compares classes",
                code="not-logits",
                got=f"an output of shape {tuple(student.shape)}",
                expected="logits of at least two classes, (samples, classes, …)",
                remedy="distill.Outputs compares outputs of any kind",
            )
        return student.movedim(axis, -1), teacher.movedim(axis, -1)

    def axis(self, output: torch.Tensor) -> int:
        """Return the class axis of an output: the axis that integer labels lack.

        If that is ambiguous: the second of four or more axes, as in segmentation, otherwise the last.
        """
        usual = (1, -1) if output.dim() > 3 else (-1, 1)
        if output.dim() < 2:
            return -1
        if isinstance(self.target, torch.Tensor) and not self.target.is_floating_point():
            lacks = {1: output.shape[:1] + output.shape[2:], -1: output.shape[:-1]}
            if matching := [axis for axis in usual if self.target.shape == lacks[axis]]:
                return matching[0]
        return next((axis for axis in usual if output.shape[axis] > 1), -1)

    def pairs(self, features: Sequence[tuple[str, str]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the (student's, teacher's) values of feature pairs; without any, the first outputs."""
        if not features:
            return [(first_output(self.student), first_output(self.teacher))]
        return [(self.student_features[mine], self.teacher_features[theirs]) for mine, theirs in features]

    def classes(self) -> torch.Tensor:
        """Return the labels as (samples,) int64; negative ones are not a class (`ignore_index` of torch's losses).

        Raises:
            TaskError: There are no labels, or they are not classes.
        """
        if not isinstance(self.target, torch.Tensor) or self.target.is_floating_point():
            raise TaskError(
                "this distillation needs classes as labels",
                code="not-classes",
                got=f"{self.target.dtype} {tuple(self.target.shape)}"
                if isinstance(self.target, torch.Tensor)
                else type(self.target).__name__,
                expected="a tensor of int64",
                remedy="distill.Logits needs no labels",
            )
        return self.target.reshape(-1).long()


DistillationLoss = Callable[[DistillationInputs], torch.Tensor]


class Distillation(Protocol):
    """A distillation loss: a frozen dataclass."""

    @property
    def weight(self) -> float:
        """Weight in the training objective."""
        ...

    @property
    def features(self) -> tuple[tuple[str, str], ...]:
        """Pairs of intermediate features that the loss reads: sites, or parts of the networks."""
        ...

    def loss(self, inputs: DistillationInputs) -> DistillationLoss:
        """Return the loss function for a training; `inputs` are the first ones, for their shapes.

        If it is a module, its parameters are trained with the student and discarded at the end.
        """
        ...


class Kept(Protocol):
    """A teacher with cached outputs: `penjing.distill.TeacherCache`."""

    @property
    def teacher(self) -> nn.Module | str | None:
        """The network to run on new samples."""
        ...

    def opened(self, task: Task) -> nn.Module:
        """Return the module to call."""
        ...


Tutor = nn.Module | Kept | str
Teacher = Tutor | tuple[Tutor, ...] | None


def opened(teacher: Tutor, task: Task) -> nn.Module:
    """Return a teacher as a module; a path is opened.

    Only data files are opened, never code: a recipe that names a teacher can't run code by doing so.

    Args:
        teacher: See `penjing.Finetune.teacher`.
        task: Its example is used to capture an exported program.

    Raises:
        SourceError: The file is missing, or does not contain a network.
        CheckpointError: Opening it would run code.
    """
    if isinstance(teacher, nn.Module):
        return teacher
    if not isinstance(teacher, str):
        return teacher.opened(task)
    path = Path(teacher)
    if not path.is_dir() and not (path.suffix.lower() == ".pt2" and path.is_file()):
        raise SourceError(
            "the teacher can't be opened",
            code="unopenable",
            got=repr(teacher),
            expected="a .pt2 file or a Hugging Face folder; 'self', or no teacher for the source network",
            remedy=suggest_file(path) or "in Python, give the module itself, of any origin",
        )
    with preserve_rng_state():
        try:
            module = open_file(path).module
            return module if isinstance(module, nn.Module) else capture_network(module, *task.call(), task.dynamic)
        except PenjingError as error:
            raise _of_the_teacher(error) from error


def _of_the_teacher(error: PenjingError) -> PenjingError:
    """The same error, told of the teacher."""
    parts: dict[str, Any] = {"got": error.got, "expected": error.expected, "remedy": error.remedy}
    return type(error)(f"the teacher: {error.what}", code=error.code, field=error.field, **parts)


class Distiller:
    """The student and the teachers of a training.

    Args:
        student: The network that is trained.
        teacher: See `penjing.Finetune.teacher`.
        distillations: The distillation losses.
        context: Provides the source network, the example and the device.

    Raises:
        TaskError: There is no teacher, or features of several teachers are requested.
        RecipeError: A feature does not exist.
    """

    def __init__(
        self, student: nn.Module, teacher: Teacher, distillations: Sequence[Distillation], context: Context
    ) -> None:
        self.distillations, self.context = tuple(distillations), context
        self.teachers = teachers(student, teacher, context)
        self.modes = [(part, part.training) for model in self.teachers for part in model.modules()]
        self.homes = [next((t.device for t in model.state_dict().values()), None) for model in self.teachers]
        self.pairs = [pair for distillation in self.distillations for pair in distillation.features]
        try:
            for model in self.teachers:
                model.eval()
            self.teacher_view = teacher_view(self.teachers, [name for _, name in self.pairs], context.task)
            for view in self.teacher_view:
                (view.view if isinstance(view, Tapped) else view).to(context.device)
            self.student = self._student_view(student)
        except BaseException:
            self.release()
            raise
        self.adapters = nn.ModuleList()
        self.losses: dict[str, tuple[float, DistillationLoss]] = {}

    def release(self) -> None:
        """Restore the teachers' devices and modes."""
        for model, home in zip(self.teachers, self.homes, strict=True):
            if home is not None:
                model.to(home)
        for part, mode in self.modes:
            part.training = mode

    def of(self, student: nn.Module) -> Distiller:
        """Return a distiller for another student of the same structure, with its own adapters."""
        other = copy.copy(self)
        other.student = other._student_view(student)
        other.losses, other.adapters = copy.deepcopy((self.losses, self.adapters))
        return other

    def prepare(self, cast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Create the losses, and their adapters, from the shapes of the task's example."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(self.context.device), self.context.task.call())
        module = self.student.view if isinstance(self.student, Tapped) else self.student
        with in_eval_mode(module), torch.no_grad(), cast():
            output = self.student(*args, **kwargs)
            try:
                inputs = self.inputs(output, None, (args, kwargs), done=0.0)
            except PenjingError:
                raise
            except Exception as error:
                message = next(iter(str(error).strip().splitlines()), "")
                raise TaskError(
                    "the teacher can't take Task.example",
                    code="teacher-raised",
                    got=f"{type(error).__name__}: {message[:300]}",
                    expected="a network that is called like the student",
                    remedy="wrap it in a module whose forward converts the student's inputs to the teacher's",
                ) from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.context.seed % 2**63)
            for distillation in self.distillations:
                title, again = type(distillation).__name__, 1
                while title in self.losses:
                    title, again = f"{type(distillation).__name__} {again + 1}", again + 1
                self.losses[title] = distillation.weight, distillation.loss(inputs)
        self.adapters.extend(t for _, t in self.losses.values() if isinstance(t, nn.Module))
        values = pytree.tree_leaves((inputs.student_features, inputs.student))
        exact = any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in values)
        self.adapters.to(self.context.device, torch.float64 if exact else torch.float32).train()

    def inputs(self, output: Any, target: Any, call: Call, done: float) -> DistillationInputs:
        """Run the teachers on the call that the student has just processed, and collect the losses' inputs."""
        args, kwargs = call
        student_values = self.student.values() if isinstance(self.student, Tapped) else {}
        with torch.no_grad():
            outputs = [model(*args, **kwargs) for model in self.teacher_view]
        teacher_values = self.teacher_view[0].values() if isinstance(self.teacher_view[0], Tapped) else {}
        answer = outputs[0] if len(outputs) == 1 else _mean(outputs)
        return DistillationInputs(
            in_fp32(output), in_fp32(answer), target, in_fp32(dict(student_values)), in_fp32(dict(teacher_values)), done
        )

    def terms(self, inputs: DistillationInputs) -> dict[str, torch.Tensor]:
        """Return every weighted loss by the name of its distillation."""
        return {name: weight * term(inputs) for name, (weight, term) in self.losses.items()}

    def digest(self) -> str:
        """Return a digest of the teachers' weights, which a resumed training must share."""
        return fingerprint_by_name(self.teachers)

    def _student_view(self, student: nn.Module) -> Any:
        names = [name for name, _ in self.pairs]
        if not names:
            return student
        if not isinstance(student, fx.GraphModule):
            raise TaskError(
                "features of the student can't be read",
                code="not-captured",
                got=f"a {type(student).__name__}",
                expected="a captured network, as in a recipe",
                remedy="penjing.apply(penjing.Recipe(penjing.Finetune(...)), network, task)",
            )
        return Tapped(student, names, "student")


def teacher_view(models: Sequence[nn.Module], names: Sequence[str], task: Task) -> list[Any]:
    """Return the teachers, or a view of the single teacher that records features by these names.

    Raises:
        TaskError: Features of several teachers, or of a cached teacher, are requested.
        RecipeError: A feature does not exist.
        ExportError: The teacher can't be captured.
    """
    if not names:
        return list(models)
    if len(models) > 1:
        raise TaskError(
            "features of several teachers can't be averaged",
            code="several-teachers",
            got=f"{len(models)} teachers and the features {', '.join(names)}",
            expected="one teacher, or losses on outputs alone",
        )
    (model,) = models
    if getattr(model, "outputs_only", False):
        raise TaskError(
            "a cached teacher has no intermediate features",
            code="only-outputs",
            got=f"the features {', '.join(names)}",
            expected="losses on outputs alone, for example distill.Logits",
            remedy="give the network itself as the teacher",
        )
    if not isinstance(model, fx.GraphModule):
        try:
            model = capture_network(model, *task.call(), task.dynamic)
        except ExportError as error:
            raise _of_the_teacher(error) from error
    return [Tapped(model, names, "teacher")]


def _mean(outputs: Sequence[Any]) -> Any:
    """The mean of several teachers' outputs, output by output."""
    every = [pytree.tree_flatten(one) for one in outputs]
    shapes = [[tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in leaves] for leaves, _ in every]
    if any(form != every[0][1] for _, form in every) or any(one != shapes[0] for one in shapes):
        raise TaskError(
            "the teachers have different outputs",
            code="teachers-differ",
            got=", ".join(map(str, shapes)),
            expected="the same outputs, with the same classes in the same order",
        )
    means = [_average(same) for same in zip(*(leaves for leaves, _ in every), strict=True)]
    return pytree.tree_unflatten(means, every[0][1])


def _average(values: Sequence[Any]) -> Any:
    numbers = isinstance(values[0], torch.Tensor) and values[0].is_floating_point()
    return torch.stack(list(values)).mean(0) if numbers else values[0]


def in_fp32(output: Any) -> Any:
    """Convert to fp32, in which losses are computed: bfloat16 has only 8 significant bits."""
    half = (torch.bfloat16, torch.float16)
    return pytree.tree_map_only(torch.Tensor, lambda t: t.float() if t.dtype in half else t, output)


def teachers(student: nn.Module, teacher: Teacher, context: Context) -> list[nn.Module]:
    """Return the teachers as modules; for self-distillation, a copy of the student.

    Raises:
        TaskError: There is no teacher.
        SourceError: A file is missing, or does not contain a network.
    """
    if teacher is None and context.source is None:
        raise TaskError(
            "there is no teacher",
            code="no-teacher",
            got="teacher=None, and no source network",
            expected="a network to distil from",
            remedy="Finetune(distill=..., teacher=network), or teacher='self'",
        )

    def one(named: Any) -> nn.Module:
        if named is student or (isinstance(named, str) and named == "self"):
            return copy.deepcopy(student)
        if not isinstance(named, nn.Module | str) and named.teacher is student:
            named = replace(named, teacher=copy.deepcopy(student))
        return opened(named, context.task)

    several = teacher if isinstance(teacher, tuple) else (context.source if teacher is None else teacher,)
    return [one(named) for named in several]
