"""Object detection: the mean average precision of COCO, from a network's raw outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from penjing.errors import TaskError
from penjing.tasks.fields.detector_outputs import Decode, Decoded, Reader, Reading
from penjing.tasks.fields.field_task import Batches, Data, field_task
from penjing.tasks.fields.labelled import Metric, Predict, called, pairs
from penjing.tasks.keywords import suggesting
from penjing.tasks.metrics.boxes import CONVENTIONS, inside, suppress, to_corners
from penjing.tasks.metrics.detection import THRESHOLDS, Detections, Objects, mean_average_precision
from penjing.tasks.task import Task

Array = np.ndarray[Any, Any]

_FAILS = 0.02  # mAP@0.5 below which it is looked whether another convention explains the boxes
_EXPLAINS = 0.1  # mAP@0.5 from which it does
_DEGENERATE = 0.5  # share of boxes without a width or height from which the convention is to blame


@suggesting
def detection(
    test: Any,
    *,
    boxes: str = "xyxy",
    truth: str = "xyxy",
    objectness: bool = False,
    decode: Decode | None = None,
    score_threshold: float = 0.01,
    overlap: float = 0.65,
    max_detections: int = 100,
    thresholds: Sequence[float] = THRESHOLDS,
    train: Any = None,
    select: Any = None,
    calibration: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    batch: int = 32,
    dynamic: Mapping[str | int, Mapping[int, str]] | None = None,
    name: str = "detection",
) -> Task:
    """Create a detection task, whose metric is mAP@0.5:0.95 as COCO computes it.

    The target of an image is ``{"boxes": (n, 4), "labels": (n,)}``, with ``"iscrowd": (n,)`` if there are crowds; or an
    array (n, 5) of boxes and classes, where rows with a negative class are padding. Classes count from 0.

    Args:
        test: (images, targets), or batches of them; images (N, channels, height, width) or channels last.
        boxes: Convention of the network's boxes: "xyxy" (two corners), "cxcywh" (centre and size), "xywh" (corner and
            size) or "yxyx", in pixels; with " relative" behind it in parts of the image's width and height.
        truth: Convention of the targets' boxes.
        objectness: Whether the network's rows hold, behind the box, a score that multiplies those of the classes.
        decode: From the outputs to (boxes, scores, labels) of every image, without boxes that overlap a better one.
            None: the first output is (N, rows, 4 + classes), boxes and scores from 0 to 1, or the first two are boxes
            (N, rows, 4) and scores (N, rows, classes); boxes that overlap a better one of their class are dropped.
            What `penjing.postprocess.Detections` gives is recognized by its names: corners, whatever `boxes` says.
        score_threshold: Least score that counts, without `decode`.
        overlap: Intersection over union above which the worse of two boxes is dropped, without `decode`.
        max_detections: Best boxes of an image and class that count.
        thresholds: Intersections over union from which a box counts as right.
        train: As `test`; for fine-tuning, with `loss`.
        select: As `test`.
        calibration: Images alone; None takes those of `train`.
        loss: ``loss(output, target)``.
        batch: Images of a batch where data is given whole.
        dynamic: See `Task.dynamic`.
        name: Name of the task in tables.

    Raises:
        TaskError: Data or boxes are not of the form said; where the boxes fit another convention, it is named. While
            evaluating too.
    """
    for word, value in (("boxes", boxes), ("truth", truth)):
        if value not in CONVENTIONS:
            raise TaskError(
                f"{word} is not a convention of boxes",
                code="convention",
                got=repr(value),
                expected=", ".join(CONVENTIONS),
                remedy='two corners in pixels are "xyxy", centre and size as parts of the image "cxcywh relative"',
            )
    reader = Reader(boxes, objectness, score_threshold, decode)
    judge = _Judge(reader, truth, overlap, max_detections, tuple(thresholds))
    data = Data(test=test, train=train, select=select, calibration=calibration, batch=batch, dynamic=dynamic, name=name)
    every = tuple(thresholds) == THRESHOLDS
    return field_task(
        data, judge.metric, metric_name="mAP@0.5:0.95" if every else "mAP@" + ",".join(map(str, thresholds)), loss=loss
    )


@dataclass(frozen=True)
class _Judge:
    """From batches to a metric."""

    reader: Reader
    truth: str
    overlap: float
    most: int
    thresholds: tuple[float, ...]

    def metric(self, batches: Batches, what: str) -> Metric:
        """The metric on these batches, whose targets are checked first."""
        count = 0
        for images, targets in pairs(batches, what):
            objects = [_target(t, self.truth, what) for t in targets]
            _check_truth(objects, self.truth, _size(images), what)
            count += sum(int((~crowd).sum()) for _, _, crowd in objects)
        if not count:
            raise TaskError(
                f"the images of {what} hold no object",
                code="no-objects",
                got="no box that is not a crowd",
                expected="at least one: mean average precision is not defined otherwise",
            )

        def evaluate(predict: Predict) -> float:
            decoded: list[Decoded] = []
            sizes: list[tuple[int, int]] = []
            objects: list[Objects] = []
            for images, targets in pairs(batches, what):
                size = _size(images)
                reading = self.reader(called(predict, images))
                _check_decoded(reading.images, len(targets))
                decoded += reading.images
                sizes += [size] * len(targets)
                objects += [self._objects(target, size, what) for target in targets]
            return self._score(replace(reading, images=decoded), sizes, objects)

        return evaluate

    def _score(self, reading: Reading, sizes: list[tuple[int, int]], objects: list[Objects]) -> float:
        said = reading.convention

        def at(convention: str, thresholds: Sequence[float]) -> float:
            detections = self._detections(reading, convention, sizes)
            return mean_average_precision(detections, objects, thresholds=thresholds, max_detections=self.most)

        value = at(said, self.thresholds)
        if value < _FAILS and at(said, (0.5,)) < _FAILS:
            explained = {convention: at(convention, (0.5,)) for convention in CONVENTIONS if convention != said}
            best = max(explained, key=lambda convention: explained[convention])
            if explained[best] > _EXPLAINS:
                raise TaskError(
                    f'the network\'s boxes are not "{said}"',
                    code="convention",
                    got=f'boxes that look like "{best}": mAP@0.5 is {explained[best]:.3f} if they are read as such',
                    expected=f'"{said}"',
                    remedy=f'write detection(..., boxes="{best}")',
                )
            self._check_first_class(self._detections(reading, said, sizes), objects)
        return value

    def _check_first_class(self, detections: list[Detections], objects: list[Objects]) -> None:
        """Refuse classes of the truth that are those of the network only where one of them counts from 1."""
        for shift, whose in ((1, "the targets"), (-1, "the network")):
            shifted = [replace(one, labels=one.labels + shift) for one in detections]
            value = mean_average_precision(shifted, objects, thresholds=(0.5,), max_detections=self.most)
            if value > _EXPLAINS:
                raise TaskError(
                    "the classes of the targets are not those of the network",
                    code="classes",
                    got=f"mAP@0.5 is {value:.3f} if the classes of {whose} count from 1",
                    expected="the class of a box is the place of its score, from 0",
                    remedy="write labels - 1 in the targets" if shift == 1 else "give decode= with labels - 1",
                )

    def _detections(self, reading: Reading, convention: str, sizes: list[tuple[int, int]]) -> list[Detections]:
        overlap = None if reading.suppressed else self.overlap
        rows = zip(reading.images, sizes, strict=True)
        return [_in_pixels(image, convention, size, overlap) for image, size in rows]

    def _objects(self, target: Any, size: tuple[int, int], what: str) -> Objects:
        boxes, labels, crowd = _target(target, self.truth, what)
        return Objects(to_corners(boxes, self.truth, size), labels, crowd)


def _in_pixels(row: Decoded, convention: str, size: tuple[int, int], overlap: float | None) -> Detections:
    """Corners in pixels; boxes that overlap a better one of their class by more than `overlap` are dropped."""
    boxes, scores, labels = (np.asarray(part) for part in row)
    if not np.isfinite(scores).all() or not np.isfinite(boxes).all():
        raise TaskError(
            "mAP can't be computed: boxes or scores are not finite",
            code="not-finite",
            got=f"{int((~np.isfinite(scores)).sum())} scores and {int((~np.isfinite(boxes)).sum())} edges",
            expected="numbers",
        )
    corners = to_corners(boxes.reshape(-1, 4), convention, size)
    if overlap is not None:
        remain = suppress(corners, scores, labels, overlap=overlap, most=len(scores))
        corners, scores, labels = corners[remain], scores[remain], labels[remain]
    return Detections(corners, scores, labels)


def _check_decoded(rows: Any, images: int) -> None:
    """Refuse what `decode` gives unless it is boxes, scores and labels of every image, as many of each."""
    if not isinstance(rows, Sequence) or len(rows) != images:
        got = f"{len(rows)} for {images} images" if isinstance(rows, Sequence) else f"a {type(rows).__name__}"
    else:
        shapes = [tuple(np.shape(part) for part in row) if isinstance(row, Sequence) else () for row in rows]
        wrong = [i for i, shape in enumerate(shapes) if not _fits(shape)]
        if not wrong:
            return
        got = f"shapes {', '.join(map(str, shapes[wrong[0]])) or type(rows[wrong[0]]).__name__} for image {wrong[0]}"
    raise TaskError(
        "decode does not give the detections of every image",
        code="decode",
        got=got,
        expected="a list of (boxes, scores, labels), one an image, of shapes (n, 4), (n,) and (n,)",
    )


def _fits(shapes: tuple[tuple[int, ...], ...]) -> bool:
    if len(shapes) != 3:
        return False
    boxes, scores, labels = shapes
    empty = boxes == (0,)  # a list without boxes
    return (empty or (len(boxes) == 2 and boxes[1] == 4)) and len(scores) == 1 and scores == labels == boxes[:1]


def _target(target: Any, convention: str, what: str) -> tuple[Array, Array, Array]:
    """Boxes (n, 4), labels (n,) and crowds (n,) of an image, checked for their form."""
    if isinstance(target, Mapping):
        missing = {"boxes", "labels"} - target.keys()
        boxes, labels = (np.asarray(target.get(key, ())) for key in ("boxes", "labels"))
        boxes = boxes.reshape(-1, 4) if not boxes.size else boxes
        crowd = np.asarray(target.get("iscrowd", np.zeros(len(labels)))).astype(bool)
        got = f"a dict of {', '.join(map(str, target))}" if missing else f"boxes {boxes.shape}, labels {labels.shape}"
        right = not missing and boxes.shape == (len(labels), 4) and labels.ndim == 1 and crowd.shape == labels.shape
    else:
        rows = np.asarray(target)
        got = f"an array of shape {rows.shape}"
        right = rows.ndim == 2 and rows.shape[1] == 5 and rows.dtype.kind in "iuf"
        rows = rows[rows[:, 4] >= 0] if right else np.zeros((0, 5))
        boxes, labels, crowd = rows[:, :4], rows[:, 4], np.zeros(len(rows), bool)
    if not right or not np.isfinite(boxes.astype(np.float64)).all() or (labels != np.round(labels)).any():
        raise TaskError(
            f"a target of {what} is not boxes and classes",
            code="target",
            got=got if not right else "values that are not finite, or classes that are not whole numbers",
            expected='{"boxes": (n, 4), "labels": (n,)}, or an array (n, 5) of boxes and classes',
            remedy=f'give boxes in the convention "{convention}", and classes that count from 0',
        )
    return boxes, labels.astype(np.int64), crowd


def _check_truth(
    targets: Iterable[tuple[Array, Array, Array]], convention: str, size: tuple[int, int], what: str
) -> None:
    """Refuse boxes that can't be of the convention, and say of which they look."""
    boxes = np.concatenate([target[0] for target in targets]).astype(np.float64)
    if not len(boxes):
        return
    corners = to_corners(boxes, convention, size)
    sizes = corners[:, 2:] - corners[:, :2]
    parts = boxes.max() <= 1.5 and min(size) > 4  # of the image's sides, as far as the numbers say
    tiny = parts and not convention.endswith("relative")
    share = inside(boxes, convention, size)
    others = {
        other: inside(boxes, other, size)
        for other in CONVENTIONS
        if other != convention and other.endswith("relative") == parts
    }
    # Real data has some boxes without a width or height: they count as any other, and no convention explains them.
    turned = (sizes < 0).any() or (sizes == 0).any(axis=1).mean() > _DEGENERATE
    if not turned and not tiny and share >= 0.5 and max(others.values()) <= max(0.9, share + 0.2):
        return
    fitting = [other for other in others if others[other] > 0.9]
    wrong = int((sizes <= 0).any(axis=1).sum())
    likely = " or ".join(f'"{other}"' for other in fitting)
    raise TaskError(
        f'the boxes of {what} are not "{convention}"',
        code="convention",
        got=f"{boxes[0].tolist()} is the first of {len(boxes)}; {wrong} have no positive size, and "
        + (f"they look like {likely}" if fitting else "no convention fits"),
        expected=f'"{convention}" in an image of {size[1]} × {size[0]} pixels',
        remedy=f'write detection(..., truth="{fitting[0]}")' if fitting else "check how the boxes are scaled",
    )


def _size(images: Any) -> tuple[int, int]:
    """Height and width of images (N, channels, height, width), or with the channels last."""
    if isinstance(images, Mapping):
        images = next(iter(images.values()))
    elif isinstance(images, tuple | list):
        images = images[0]
    if np.ndim(images) != 4:
        raise TaskError(
            "the first input is not images",
            code="images",
            got=f"shape {np.shape(images)}",
            expected="(images, channels, height, width), or channels last",
        )
    _, a, b, c = np.shape(images)
    return (a, b) if c in (1, 3, 4) and a not in (1, 3, 4) else (b, c)
