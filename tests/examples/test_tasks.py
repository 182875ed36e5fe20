import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from examples import data
from penjing.errors import CheckpointError
from tests.raises import raises_case

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def fashion():
    from examples.fashion_mnist.task import task

    try:
        return task()
    except data.DataUnavailable as error:
        if os.environ.get("PENJING_REQUIRE_FASHION_MNIST") == "1":
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/network.py")) + sorted(EXAMPLES.glob("*/task.py")))
def test_every_example_loads_from_any_folder(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(file))


def test_fashion_batches_cover_the_train_set_once_and_leave_the_held_out_pictures(fashion):
    counts = torch.zeros(10, dtype=torch.long)
    batches = 0
    for images, labels in fashion.train:
        assert images.shape == (len(labels), 1, 28, 28)
        counts += labels.bincount(minlength=10)
        batches += 1
    assert batches == len(fashion.train)
    assert counts.tolist() == np.bincount(data.fashion_mnist()["train_labels"][:-5000]).tolist()


def test_fashion_batches_follow_the_seed_and_differ_between_epochs(fashion):
    def first():
        return next(iter(fashion.train))

    torch.manual_seed(5)
    one, other = first(), first()
    torch.manual_seed(5)
    again = first()
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])


def test_augmentation_is_a_shifted_and_flipped_crop():
    from examples.fashion_mnist.task import PADDING, Batches, normalise

    images = torch.arange(1, 26, dtype=torch.uint8).reshape(1, 1, 5, 5).repeat(64, 1, 1, 1)
    padded = torch.nn.functional.pad(images[:1], (PADDING,) * 4)
    places = range(2 * PADDING + 1)
    crops = [padded[0, :, down : down + 5, right : right + 5] for down in places for right in places]
    possible = {normalise(crop).numpy().tobytes() for one in crops for crop in (one, one.flip(-1))}
    torch.manual_seed(0)
    ((batch, _),) = Batches(images, torch.zeros(64, dtype=torch.long))
    seen = {crop.contiguous().numpy().tobytes() for crop in batch}
    assert seen <= possible
    assert len(seen) > 20


@pytest.mark.parametrize(("metric", "expected"), [("evaluate", 10_000), ("select", 5_000)])
def test_fashion_metrics_see_every_picture_once(fashion, metric, expected):
    arrays = data.fashion_mnist()
    labels = arrays["test_labels"] if metric == "evaluate" else arrays["train_labels"][-5000:]
    seen = 0

    def predict(images):  # right but for the first hundred
        nonlocal seen
        truth = labels[seen : seen + len(images)].astype(int)
        wrong = np.arange(seen, seen + len(images)) < 100
        seen += len(images)
        return np.eye(10)[(truth + wrong) % 10]

    assert getattr(fashion, metric)(predict) == pytest.approx(1 - 100 / expected)
    assert seen == expected


def test_fashion_calibration_is_normalised_and_iterates_twice(fashion):
    once, twice = torch.cat(list(fashion.calibration)), torch.cat(list(fashion.calibration))
    assert once.shape == (512, 1, 28, 28)
    assert torch.equal(once, twice)
    assert abs(once.mean()) < 0.1
    assert abs(once.std() - 1) < 0.1


def test_missing_weights_are_named(monkeypatch, tmp_path):
    from examples.fashion_mnist import network

    monkeypatch.setattr(network, "WEIGHTS", tmp_path / "resnet20.safetensors")
    with raises_case(CheckpointError, "missing"):
        network.resnet20()


def test_foreign_weights_are_refused(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    from examples.fashion_mnist import network

    monkeypatch.setattr(network, "WEIGHTS", tmp_path / "resnet20.safetensors")
    save_file({"conv1.weight": torch.zeros(1)}, network.WEIGHTS)
    with raises_case(CheckpointError, "misfit"):
        network.resnet20()
    network.WEIGHTS.write_bytes(b"not safetensors at all")
    with raises_case(CheckpointError, "misfit"):
        network.resnet20()


def test_the_digits_network_is_trained_the_same_way_each_time():
    from examples.digits.network import train, trained, untrained
    from examples.digits.task import task

    digits = task()
    state = torch.random.get_rng_state()
    network = trained()
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.inference_mode():
        assert digits.evaluate(lambda images: network(torch.from_numpy(images)).numpy()) > 0.95
    states = []
    for _ in range(2):
        torch.manual_seed(1)
        states.append(train(untrained(), digits, epochs=1).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
def test_lite0_agrees_with_itself_and_not_with_its_negative():
    from examples.imagenet_lite0.network import lite0
    from examples.imagenet_lite0.task import pixels, task

    try:
        example, network = task(), lite0()
    except data.DataUnavailable as error:
        pytest.skip(str(error))
    calibration, held_out = pixels()
    assert (len(calibration), len(held_out)) == (300, 496)
    assert {one.tobytes() for one in calibration}.isdisjoint(one.tobytes() for one in held_out)
    answers = []
    with torch.inference_mode():
        for start in range(0, 496, 10):  # as many rows as the metric will ask for, in its order
            batch = (torch.from_numpy(held_out[start : start + 10]).float() - 127) / 128
            answers.append(network(batch).numpy())
    replies = iter(answers)
    assert example.evaluate(lambda images: next(replies)) == 1.0
    replies = iter(answers)
    assert example.evaluate(lambda images: -next(replies)) == 0.0
