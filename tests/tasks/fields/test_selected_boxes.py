"""The example's detector with suppression inside, as a file in its runtime, judged by the task and by pycocotools."""

import contextlib
import io

import numpy as np
import pytest

import penjing as pj
from examples import data

SCENES = 48


@pytest.fixture(scope="module")
def labelled_scenes():
    from examples import stamps

    try:
        some = stamps._stamps("test")
    except data.DataUnavailable as error:
        pytest.skip(str(error))
    drawn = [stamps._scene(np.random.default_rng([1, number]), some) for number in range(SCENES)]
    images, boxes, _ = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
    return stamps.normalise(images), boxes


def by_pycocotools(outputs, truth):
    """The mAP of a network's selected boxes, from a COCO file and a file of results, as its users write them."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def xywh(left, top, right, bottom):
        return [float(left), float(top), float(right - left), float(bottom - top)]

    annotations = []
    for image, rows in enumerate(truth):
        for *corners, label in rows[rows[:, 4] >= 0]:
            box = xywh(*corners)
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label), "bbox": box, "iscrowd": 0}
            annotations.append(row | {"area": box[2] * box[3]})
    results = [
        {"image_id": image, "category_id": int(label), "bbox": xywh(*corners), "score": float(score)}
        for image, count in enumerate(outputs["count"])
        for corners, score, label in zip(
            outputs["boxes"][image, :count], outputs["scores"][image, :count], outputs["classes"][image, :count],
            strict=True,
        )
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(truth))],
            "annotations": annotations,
            "categories": [{"id": label} for label in range(5)],
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats[0]


@pytest.mark.slow
def test_the_metric_of_a_file_with_suppression_inside_is_that_of_pycocotools(labelled_scenes, tmp_path):
    pytest.importorskip("pycocotools")
    import onnxruntime

    from examples.detection.network import detector
    from penjing.tasks.outputs import numpy_predictor

    images, truth = labelled_scenes
    task = pj.tasks.detection((images, truth), boxes="cxcywh", calibration=images[:16], batch=16)
    network = detector()
    whole = pj.postprocess.Detections(network, boxes="cxcywh", score_threshold=0.01, iou_threshold=0.65)
    path = tmp_path / "detector.onnx"
    pj.quantize_to(whole, task, path, fast=True, threads=1)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names, asked = [port.name for port in session.get_outputs()], []

    def predict(batch):
        asked.append(dict(zip(names, session.run(None, {session.get_inputs()[0].name: batch}), strict=True)))
        return asked[-1]

    value = task.evaluate(predict)
    outputs = {name: np.concatenate([answer[name] for answer in asked]) for name in names}
    assert set(names) == {"boxes", "scores", "classes", "count"}
    assert value == pytest.approx(by_pycocotools(outputs, truth), abs=1e-9)
    # The same task judges the network without the wrapper, whose boxes are another convention's.
    raw = task.evaluate(numpy_predictor(network))
    assert raw > 0.35
    assert task.evaluate(numpy_predictor(whole)) == pytest.approx(raw, abs=1e-4)
    assert value == pytest.approx(raw, abs=0.02)
