"""Labelled images of object detection in COCO's form: a JSON file of boxes, and a folder of pictures.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; most labelling tools write this form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import TaskError
from penjing.records import reading
from penjing.tasks.images import read_rgb
from penjing.tasks.keywords import suggesting

Array = np.ndarray[Any, Any]

FITS = ("stretch", "corner", "centre")
MOST_BYTES = 1 << 30  # of the JSON file


@dataclass(frozen=True)
class Labelled:
    """An image file and its objects.

    Attributes:
        path: PNG or JPEG.
        boxes: (n, 4) left, top, width and height in pixels of the file.
        labels: (n,) classes from 0.
        crowd: (n,) whether a box holds many objects.
    """

    path: Path
    boxes: Array
    labels: Array
    crowd: Array


@dataclass(frozen=True)
class CocoImages:
    """Batches of (images, targets) for `penjing.tasks.detection`, read anew on every pass; see `coco`.

    Attributes:
        items: Images in the order of the file.
        classes: Names of the classes, in the order of their ids.
        size: Height and width of the network's images, in pixels.
    """

    items: tuple[Labelled, ...]
    classes: tuple[str, ...]
    size: tuple[int, int]
    fit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    bgr: bool
    batch: int

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch)

    def __iter__(self) -> Iterator[tuple[Array, list[dict[str, Array]]]]:
        for start in range(0, len(self.items), self.batch):
            images, targets = zip(*map(self._read, self.items[start : start + self.batch]), strict=True)
            yield np.stack(images), list(targets)

    def _read(self, item: Labelled) -> tuple[Array, dict[str, Array]]:
        """An image (3, height, width) float32, and its boxes as corners in the image's pixels."""
        height, width = self.size

        def resized(across: int, down: int) -> tuple[int, int]:
            if self.fit == "stretch":
                return width, height
            ratio = min(width / across, height / down)
            return max(1, round(across * ratio)), max(1, round(down * ratio))

        picture, original = read_rgb(item.path, resized)
        across, down = picture.size
        left, top = ((width - across) // 2, (height - down) // 2) if self.fit == "centre" else (0, 0)
        canvas = np.full((height, width, 3), 114, np.float32)  # the grey that detectors of the YOLO family pad with
        canvas[top : top + down, left : left + across] = np.asarray(picture)
        ratios = np.array(picture.size) / original
        first = item.boxes[:, :2] * ratios + (left, top)
        corners = np.concatenate([first, first + item.boxes[:, 2:] * ratios], axis=1)
        normal = (canvas * self.scale - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        image = (normal[..., ::-1] if self.bgr else normal).transpose(2, 0, 1)
        target = {"boxes": corners, "labels": item.labels, "iscrowd": item.crowd}
        return np.ascontiguousarray(image, np.float32), target


@suggesting
def coco(
    annotations: Path | str,
    images: Path | str | None = None,
    *,
    size: int | tuple[int, int],
    fit: str = "stretch",
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
    std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    scale: float = 1 / 255,
    bgr: bool = False,
    batch: int = 16,
) -> CocoImages:
    """Open labelled images in COCO's form, for `penjing.tasks.detection`.

    Classes count from 0 in the order of their ids, which is what detectors are trained with.

    Args:
        annotations: JSON file with ``images``, ``annotations`` and ``categories``.
        images: Folder of the images. None looks beside the file, in ``images`` beside it, and for
            ``annotations/instances_NAME.json`` in ``NAME`` and ``images/NAME`` one folder up.
        size: Height and width of the network's images in pixels, or one number for both.
        fit: "stretch" changes the ratio of the sides; "corner" keeps it and pads on the right and below, as YOLOX does;
            "centre" pads all around, as YOLOv5 to YOLOv8 do.
        mean: Of the channels, of scaled values, in the order red, green, blue.
        std: Standard deviation of the channels.
        scale: Factor of the pixels from 0 to 255; 1 leaves them as they are.
        bgr: Whether the network takes blue first.
        batch: Images of a batch.

    Raises:
        TaskError: The file is not of this form, or names an image that is missing.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if fit not in FITS or min(height, width, batch) < 1:
        raise TaskError(
            "images can't be brought to the network's size",
            code="fit",
            got=f"fit={fit!r}, size={size}, batch={batch}",
            expected=f"fit of {', '.join(FITS)}; positive numbers",
        )
    path = Path(annotations)
    data = _sections(path)
    categories = sorted(data["categories"], key=lambda row: row["id"])
    classes = {row["id"]: i for i, row in enumerate(categories)}
    names = tuple(str(row.get("name", row["id"])) for row in categories)
    rows: dict[Any, list[Mapping[str, Any]]] = {row["id"]: [] for row in data["images"]}
    for row in data["annotations"]:
        _check_annotation(row, rows, classes, path)
        rows[row["image_id"]].append(row)
    folder = _folder(path, Path(images) if images is not None else None, data["images"])
    items = tuple(
        Labelled(
            _inside(folder, image["file_name"], path),
            np.array([row["bbox"] for row in rows[image["id"]]], np.float64).reshape(-1, 4),
            np.array([classes[row["category_id"]] for row in rows[image["id"]]], np.int64),
            np.array([bool(row.get("iscrowd", 0)) for row in rows[image["id"]]], bool),
        )
        for image in data["images"]
    )
    return CocoImages(items, names, (height, width), fit, mean, std, scale, bgr, batch)


def _sections(path: Path) -> dict[str, list[Mapping[str, Any]]]:
    """The three lists of a file, each entry with an id (annotations need none)."""
    try:
        data = reading.json_file(path, MOST_BYTES)
    except reading.UNREADABLE as cause:
        raise _not_coco(path, str(cause)) from cause
    needed = {"images": ("id", "file_name"), "categories": ("id",), "annotations": ("image_id", "category_id", "bbox")}
    for section, keys in needed.items():
        rows = data.get(section) if isinstance(data, dict) else None
        if not isinstance(rows, list) or not (rows or section == "annotations"):
            raise _not_coco(path, f"no list {section!r}")
        for i, row in enumerate(rows):
            if not isinstance(row, dict) or not row.keys() >= set(keys):
                raise _not_coco(path, f"{section}[{i}] without {', '.join(keys)}")
        ids = [row["id"] for row in rows] if section != "annotations" else []
        if not all(isinstance(number, int) for number in ids) or len(set(ids)) != len(ids):
            raise _not_coco(path, f"{section} whose ids are not different whole numbers")
    return {section: data[section] for section in needed}


def _check_annotation(
    row: Mapping[str, Any], images: Mapping[Any, Any], classes: Mapping[Any, int], path: Path
) -> None:
    box = row["bbox"]
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
    if row["image_id"] not in images or row["category_id"] not in classes:
        raise _not_coco(path, f"an object of image {row['image_id']!r}, category {row['category_id']!r}: not listed")
    if not numbers or not all(math.isfinite(x) for x in box) or min(box[2:]) < 0:
        raise _not_coco(path, f"bbox {box!r} of image {row['image_id']!r}")


def _folder(path: Path, images: Path | None, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The folder that holds the first image."""
    above, name = path.parent.parent, path.stem.removeprefix("instances_")
    places = [images] if images else [path.parent, path.parent / "images", above / name, above / "images" / name]
    for place in places:
        if (place / str(rows[0]["file_name"])).is_file():
            return place
    raise TaskError(
        "the images of the labels are missing",
        code="images",
        got=f"no {rows[0]['file_name']!r} in {', '.join(map(str, places))}",
        expected="a folder with the files that the labels name",
        remedy='coco("labels.json", "folder/of/images", ...)',
    )


def _inside(folder: Path, name: Any, path: Path) -> Path:
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise _not_coco(path, f"the file name {name!r}, which leads out of the folder of images")
    if not (folder / name).is_file():
        raise TaskError("an image of the labels is missing", code="images", got=str(folder / name), expected="a file")
    return folder / name


def _not_coco(path: Path, got: str) -> TaskError:
    return TaskError(
        f"{path.name} is not labels in COCO's form",
        code="coco",
        got=f"{path}: {got}",
        expected="a JSON file with the lists images, annotations and categories; bbox is [left, top, width, height]",
    )
