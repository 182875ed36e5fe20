import contextlib
import io

import numpy as np
import pytest

from penjing.tasks.metrics.boxes import CONVENTIONS, inside, overlaps, suppress, to_corners
from penjing.tasks.metrics.detection import THRESHOLDS, Detections, Objects, average_precisions, mean_average_precision


def crowded(seed, images=12, classes=3, crowds=True):
    """Objects and detections near them, with ties, misses, surplus boxes, wrong classes, crowds and empty images."""
    random = np.random.default_rng(seed)
    detections, truth = [], []
    for _ in range(images):
        count = int(random.integers(0, 6))
        corners = random.integers(0, 80, (count, 2))
        boxes = np.concatenate([corners, corners + random.integers(4, 60, (count, 2))], axis=1).astype(np.float64)
        labels = random.integers(0, classes, count)
        crowd = random.random(count) < 0.2 if crowds else np.zeros(count, bool)
        truth.append(Objects(boxes, labels, crowd))
        near = np.repeat(boxes, 3, axis=0) + random.normal(0, 4, (3 * count, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        wild = random.uniform(0, 60, (int(random.integers(0, 5)), 4))
        wild[:, 2:] += wild[:, :2] + 1
        every = np.concatenate([near, wild])
        kinds = np.concatenate([np.repeat(labels, 3), random.integers(0, classes, len(wild))])
        kinds = np.where(random.random(len(kinds)) < 0.1, random.integers(0, classes, len(kinds)), kinds)
        detections.append(Detections(every, random.integers(0, 12, len(every)) / 12, kinds))
    return detections, truth


def reference(detections, truth, classes=3):
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")

    def xywh(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    annotations, results = [], []
    for image, objects in enumerate(truth):
        for box, label, crowd in zip(objects.boxes, objects.labels, objects.crowd, strict=True):
            area = float((box[2] - box[0]) * (box[3] - box[1]))
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label), "bbox": xywh(box)}
            annotations.append(row | {"area": area, "iscrowd": int(crowd)})
    for image, rows in enumerate(detections):
        for box, score, label in zip(rows.boxes, rows.scores, rows.labels, strict=True):
            row = {"image_id": image, "category_id": int(label), "bbox": xywh(box), "score": float(score)}
            results.append(row)
    with contextlib.redirect_stdout(io.StringIO()):
        data = coco.COCO()
        data.dataset = {
            "images": [{"id": i} for i in range(len(truth))],
            "annotations": annotations,
            "categories": [{"id": i} for i in range(classes)],
        }
        data.createIndex()
        judge = evaluation.COCOeval(data, data.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
    return judge.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes)


@pytest.mark.parametrize("seed", range(8))
def test_average_precision_is_that_of_pycocotools(seed):
    detections, truth = crowded(seed)
    expected = reference(detections, truth)
    table = average_precisions(detections, truth)
    assert len(table) >= 2
    for label, values in table.items():
        np.testing.assert_allclose(values, expected[:, :, label].mean(axis=1), atol=1e-12)
    assert mean_average_precision(detections, truth) == pytest.approx(expected[expected > -1].mean(), abs=1e-12)


def test_only_the_best_boxes_of_an_image_count():
    box = np.array([[0.0, 0.0, 9.0, 9.0]])
    truth = [Objects(box, np.array([0]))]
    boxes = np.concatenate([np.tile([[20.0, 20.0, 30.0, 30.0]], (3, 1)), box])
    detections = [Detections(boxes, np.array([0.9, 0.8, 0.7, 0.6]), np.zeros(4, int))]
    assert mean_average_precision(detections, truth, max_detections=3) == 0.0
    assert mean_average_precision(detections, truth, max_detections=4) == pytest.approx(0.25)


def test_images_without_objects_have_no_precision():
    none = Objects(np.zeros((0, 4)), np.zeros(0, int))
    assert np.isnan(mean_average_precision([Detections(np.ones((1, 4)), np.ones(1), np.zeros(1, int))], [none]))
    assert len(THRESHOLDS) == 10


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_names_the_same_box(convention):
    left, top, right, bottom = 4.0, 6.0, 14.0, 9.0
    forms = {
        "xyxy": [left, top, right, bottom],
        "yxyx": [top, left, bottom, right],
        "xywh": [left, top, right - left, bottom - top],
        "cxcywh": [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top],
    }
    layout, _, relative = convention.partition(" ")
    box = np.array([forms[layout]])
    if relative:
        box = box / (np.array([10.0, 20.0, 10.0, 20.0]) if layout == "yxyx" else np.array([20.0, 10.0, 20.0, 10.0]))
    np.testing.assert_allclose(to_corners(box, convention, (10, 20)), [[left, top, right, bottom]])
    assert inside(box, convention, (10, 20)) == 1.0


def test_suppression_is_that_of_the_obvious_loop():
    random = np.random.default_rng(3)
    boxes = random.uniform(0, 40, (60, 4))
    boxes[:, 2:] += boxes[:, :2]
    scores, labels = random.integers(0, 20, 60) / 20, random.integers(0, 2, 60)
    expected = []
    for row in sorted(range(60), key=lambda i: -scores[i]):
        rivals = [i for i in expected if labels[i] == labels[row]]
        if all(overlaps(boxes[[row]], boxes[[i]])[0, 0] <= 0.4 for i in rivals):
            expected.append(row)
    assert suppress(boxes, scores, labels, overlap=0.4, most=60).tolist() == expected
    assert suppress(boxes, scores, labels, overlap=0.4, most=5).tolist() == expected[:5]
