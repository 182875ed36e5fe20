"""Labels in COCO's form: boxes follow their images to the network's size, and files of another form are refused."""

import json

import numpy as np
import pytest
from PIL import Image

import penjing as pj
from penjing.errors import TaskError
from penjing.tasks.opening import open_task

WIDTH, HEIGHT = 60, 40
BOXES = {7: [6, 4, 12, 10], 3: [30, 20, 24, 8]}  # category → left, top, width, height of a bright rectangle


def dataset(folder, **changes):
    """Two images with a rectangle each, a third without objects; class ids are not in order."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    annotations = []
    for number, (category, box) in enumerate(BOXES.items()):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        left, top, width, height = box
        pixels[top : top + height, left : left + width, 0] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        row = {"id": number, "image_id": number, "category_id": category, "bbox": box, "area": width * height}
        annotations.append(row | {"iscrowd": 0})
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "images" / "empty.png")
    data = {
        "images": [{"id": i, "file_name": name} for i, name in ((0, "0.png"), (1, "1.png"), (9, "empty.png"))],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "ant"}],
        "annotations": annotations,
    }  # fmt: skip
    path = folder / "labels.json"
    path.write_text(json.dumps(data | changes))
    return path


def bright(image):
    """The corners of what is bright in an image (3, height, width)."""
    rows, columns = (np.flatnonzero((image[0] > 0.5).any(axis)) for axis in (1, 0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("fit", ["stretch", "corner", "centre"])
@pytest.mark.parametrize("size", [(80, 120), 120, (20, 90)])
def test_boxes_lie_where_their_objects_are_in_the_networks_image(tmp_path, fit, size):
    opened = pj.tasks.coco(dataset(tmp_path), size=size, fit=fit, batch=2)
    assert opened.classes == ("ant", "cat")
    first, second = opened
    assert len(opened) == 2
    images = np.concatenate([first[0], second[0]])
    assert images.shape == (3, 3, *((size, size) if isinstance(size, int) else size))
    assert images.dtype == np.float32
    targets = [*first[1], *second[1]]
    assert [target["labels"].tolist() for target in targets] == [[1], [0], []]
    for image, target in zip(images[:2], targets, strict=False):
        np.testing.assert_allclose(target["boxes"][0], bright(image), atol=1.01)  # a blurred edge
    assert targets[2]["boxes"].shape == (0, 4)
    again = np.concatenate([batch for batch, _ in opened])
    np.testing.assert_array_equal(images, again)


def test_sides_keep_their_ratio_and_the_rest_is_grey(tmp_path):
    image = next(iter(pj.tasks.coco(dataset(tmp_path), size=120, fit="corner")))[0][0]
    np.testing.assert_allclose(image[:, 80:], 114 / 255, rtol=1e-6)
    assert image[0, :80].max() == 1
    assert image[1, :80].max() == 0


def test_pixels_are_normalized_and_channels_swapped(tmp_path):
    plain = next(iter(pj.tasks.coco(dataset(tmp_path), size=64, scale=1)))[0]
    assert plain.max() == 255
    mean, std = (0.5, 0.25, 0.0), (0.5, 1.0, 2.0)
    image = next(iter(pj.tasks.coco(tmp_path / "labels.json", size=64, mean=mean, std=std, bgr=True)))[0]
    expected = (plain / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(image, expected[:, ::-1], atol=1e-6)


def test_a_detector_that_finds_the_rectangles_is_right(tmp_path):
    task = pj.tasks.detection(pj.tasks.coco(dataset(tmp_path), size=(80, 120), batch=2), boxes="xyxy")

    def predict(images):
        rows = np.zeros((len(images), 1, 6), np.float32)
        for i, image in enumerate(images):
            if image.max() > 0.5:
                box = bright(image)
                rows[i, 0] = [*box, *(np.arange(2) == (box[0] < 50))]
        return rows

    assert task.evaluate(predict) > 0.7
    assert task.example.shape == (2, 3, 80, 120)


def test_the_folder_of_images_is_found_as_coco_lays_it_out(tmp_path):
    path = dataset(tmp_path)
    (tmp_path / "annotations").mkdir()
    path.rename(tmp_path / "annotations" / "instances_val.json")
    (tmp_path / "images").rename(tmp_path / "val")
    assert len(pj.tasks.coco(tmp_path / "annotations" / "instances_val.json", size=32).items) == 3
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(TaskError) as caught:
        pj.tasks.coco(tmp_path / "annotations" / "instances_val.json", size=32)
    assert caught.value.code == "images"
    assert (
        len(pj.tasks.coco(tmp_path / "annotations" / "instances_val.json", tmp_path / "elsewhere", size=32).items) == 3
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"images": []},
        {"images": [{"id": 0, "file_name": "0.png"}]},  # image 1 has an object
        {"images": [{"id": 0, "file_name": "0.png"}, {"id": 1, "file_name": "../labels.json"}]},
        {"images": [{"id": 0, "file_name": "0.png"}, {"id": 0, "file_name": "1.png"}]},
        {"categories": [{"id": 7}]},
        {"categories": {"7": "cat"}},
        {"annotations": [{"image_id": 0, "category_id": 7, "bbox": [1, 2, 3]}]},
        {"annotations": [{"image_id": 0, "category_id": 7, "bbox": [1, 2, -3, 4]}]},
        {"annotations": [{"image_id": 0, "category_id": 7}]},
        {"annotations": None},
    ],
)
def test_labels_of_another_form(tmp_path, changes):
    with pytest.raises(TaskError) as caught:
        pj.tasks.coco(dataset(tmp_path, **changes), size=32)
    assert caught.value.code == "coco"


def test_a_file_that_is_not_json_and_an_image_that_is_missing(tmp_path):
    path = dataset(tmp_path)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(TaskError) as caught:
        pj.tasks.coco(path, size=32)
    assert caught.value.code == "images"
    path.write_text("images: 3")
    with pytest.raises(TaskError) as caught:
        pj.tasks.coco(path, size=32)
    assert caught.value.code == "coco"
    with pytest.raises(TaskError) as caught:
        pj.tasks.coco(path, size=32, fit="crop")
    assert caught.value.code == "fit"


def test_labels_on_the_command_line_are_told_what_is_missing(tmp_path):
    with pytest.raises(TaskError) as caught:
        open_task(str(dataset(tmp_path)))
    assert caught.value.code == "labels"
    assert "pj.tasks.coco" in caught.value.remedy
