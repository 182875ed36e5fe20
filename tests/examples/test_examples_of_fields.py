"""The examples of the fields: their data is what they say, and nothing of the test is seen in training."""

import numpy as np
import pytest
import torch

from examples import data


def fetched(make, *arguments):
    try:
        return make(*arguments)
    except data.DataUnavailable as error:
        pytest.skip(str(error))


# --- scenes made of stamps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stamps():
    from examples import stamps

    fetched(data.pictures)
    return stamps


def test_a_scene_is_the_same_every_time_and_its_boxes_hold_its_masks(stamps):
    some = stamps._stamps("test")
    for number in range(12):
        image, boxes, mask = stamps._scene(np.random.default_rng([1, number]), some)
        again = stamps._scene(np.random.default_rng([1, number]), some)
        assert all(np.array_equal(a, b) for a, b in zip((image, boxes, mask), again, strict=True))
        assert image.shape == (3, 160, 160)
        used = boxes[boxes[:, 4] >= 0]
        assert len(used) >= 1
        covered = np.zeros_like(mask, bool)
        for left, top, right, bottom, label in used.astype(int):
            assert 0 <= left < right <= 160
            assert 0 <= top < bottom <= 160
            assert (mask[top:bottom, left:right] == label + 1).any()
            covered[top:bottom, left:right] = True
        assert not mask[~covered].any()


def test_no_stamp_of_the_test_is_trained_on(stamps):
    paths = data.pictures()
    sides = [stamps._held_out(path) for path in paths]
    assert 0.15 < np.mean(sides) < 0.35
    for path, side in zip(paths, sides, strict=True):
        mirrored = path.with_name(path.name.replace("_mirror", ""))
        assert stamps._held_out(mirrored) == side


def test_a_mirrored_scene_has_its_boxes_mirrored(stamps):
    from examples.detection.task import Batches

    image = np.zeros((8, 3, 160, 160), np.uint8)
    image[:, :, 20:40, 10:60] = 255
    boxes = np.full((8, 4, 5), -1, np.float32)
    boxes[:, 0] = 10, 20, 60, 40, 2
    torch.manual_seed(0)
    ((images, targets),) = Batches(stamps.Scenes(image, boxes, image[:, 0]), batch=8)
    lefts = set()
    for picture, (left, top, right, bottom, label) in zip(images.numpy(), targets[:, 0].int().tolist(), strict=True):
        bright = picture[0] > 0
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        assert (left, right, top, bottom, label) == (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1, 2)
        lefts.add(left)
    assert lefts == {10, 100}
    assert (targets[:, 1:] == -1).all()


def test_the_loss_of_a_detector_that_finds_all_is_smaller_than_of_one_that_is_shifted():
    from examples.detection.loss import detection_loss

    truth = torch.full((2, 4, 5), -1.0)
    truth[:, 0] = torch.tensor([40.0, 40.0, 72.0, 64.0, 1.0])
    truth[:, 1] = torch.tensor([80.0, 16.0, 144.0, 112.0, 3.0])
    rows = torch.zeros(2, 500, 9)
    rows[..., :4] = torch.tensor([56.0, 52.0, 32.0, 24.0])
    rows[:, 400:, :4] = torch.tensor([112.0, 64.0, 64.0, 96.0])
    right = rows.clone()
    from examples.detection.loss import _responsible

    for image, cell in (_responsible(truth, 500) >= 0).nonzero().tolist():
        right[image, cell, 4 + (1 if cell < 400 else 3)] = 1.0
    shifted = right.clone()
    shifted[..., 0] += 12
    assert detection_loss(right, truth) < 0.01
    assert detection_loss(right, truth) < detection_loss(shifted, truth)
    assert detection_loss(right, truth) < detection_loss(rows, truth)


# --- trained networks -------------------------------------------------------------------------------------------


def test_the_detector_finds_stamps_it_has_never_seen(stamps):
    import penjing as pj
    from examples.detection.network import detector
    from penjing.tasks.outputs import numpy_predictor

    some = stamps._stamps("test")
    drawn = [stamps._scene(np.random.default_rng([1, number]), some) for number in range(40)]
    images, boxes, _ = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
    task = pj.tasks.detection((stamps.normalise(images), boxes), boxes="cxcywh")
    assert task.evaluate(numpy_predictor(detector())) > 0.35


# --- the other fields -------------------------------------------------------------------------------------------


def test_tags_of_constructed_sentences_are_their_entities():
    from examples.tagging.task import ALPHABET, KINDS, SYLLABLES, TAGS, sentences
    from penjing.tasks.metrics.tagging import entities

    characters, tags = sentences(60, 5, SYLLABLES)
    seen = set()
    for row, marks in zip(characters, tags, strict=True):
        text = "".join(ALPHABET[number] for number in row if number)
        spans = entities([TAGS[mark] for mark in marks if mark >= 0])
        assert len(text) == (marks >= 0).sum()
        for kind, start, stop in spans:
            assert text[start:stop].strip() == text[start:stop]
            seen.add(kind)
    assert seen == set(KINDS)
    assert np.array_equal(characters, sentences(60, 5, SYLLABLES)[0])


def test_hidden_films_are_among_a_hundred_that_were_not_watched():
    from examples.recommendation.network import FILMS, USERS
    from examples.recommendation.task import candidates

    watched = np.random.default_rng(0).random((USERS, FILMS)) < 0.1
    hidden = watched.argmax(1)
    inputs, relevant = candidates(hidden, watched, seed=0)
    films, marks = inputs["film"].reshape(USERS, 100), relevant.reshape(USERS, 100)
    assert (films[marks == 1] == hidden).all()
    assert not watched[np.arange(USERS)[:, None], films][marks == 0].any()
    assert all(len(set(row)) == 100 for row in films.tolist())


def test_texts_become_numbers_of_words():
    from examples.text.task import LENGTH, START, UNKNOWN, numbers, words

    assert words("Oil prices rose 3 pct.") == ["oil", "prices", "rose", "pct"]
    row = numbers(["Oil rose, they say"], {"oil": 7, "rose": 8})[0]
    assert row[:6].tolist() == [START, 7, 8, UNKNOWN, UNKNOWN, 0]
    assert row.shape == (LENGTH,)


def test_noise_has_the_loudness_that_was_asked_for_and_spectra_the_networks_shape():
    from examples.keywords.task import SAMPLES, noisy, spectra

    sounds = np.sin(np.arange(SAMPLES) / 5)[None].repeat(16, 0).astype(np.float32)
    heard = noisy(sounds, np.random.default_rng(0))
    power = (heard**2).mean(1) / (sounds**2).mean(1)  # 1 of the sound, 0.01 to 1 of the noise
    assert (power > 0.97).all()
    assert (power < 2.1).all()
    assert spectra(heard).shape == (16, 1, 40, 84)
    assert np.array_equal(heard, noisy(sounds, np.random.default_rng(0)))


# --- training ---------------------------------------------------------------------------------------------------


def test_training_an_example_writes_the_weights_that_were_judged(tmp_path, monkeypatch, capsys):
    import penjing as pj
    from examples.training import Settings, main
    from examples.weights import load
    from penjing.tasks.outputs import numpy_predictor

    x = np.random.default_rng(0).normal(size=(256, 4)).astype(np.float32)
    y = (x[:, 0] > x[:, 1]).astype(np.int64)

    def task():
        return pj.tasks.classification((x, y), train=(x, y), batch=32)

    def untrained():
        return torch.nn.Linear(4, 2)

    weights = tmp_path / "line.safetensors"
    monkeypatch.setattr("sys.argv", ["train.py", "--epochs", "8"])
    main(untrained, task, Settings(epochs=1, learning_rate=0.1), weights)
    first, printed = weights.read_bytes(), capsys.readouterr().out
    accuracy = task().evaluate(numpy_predictor(load(untrained(), weights)))
    assert accuracy > 0.95
    assert printed.count("epoch ") == 8
    assert printed.endswith(f"accuracy {accuracy:.4f}\n")
    monkeypatch.setattr("sys.argv", ["train.py", "--epochs", "8", "--out", str(tmp_path / "again.safetensors")])
    main(untrained, task, Settings(epochs=1, learning_rate=0.1), weights)
    assert (tmp_path / "again.safetensors").read_bytes() == first
    monkeypatch.setattr("sys.argv", ["train.py", "--epochs", "8", "--seed", "1", "--out", str(tmp_path / "other")])
    main(untrained, task, Settings(epochs=1, learning_rate=0.1), weights)
    assert (tmp_path / "other").read_bytes() != first
    assert weights.read_bytes() == first


@pytest.mark.parametrize("field", ["detection", "segmentation", "text", "tagging", "keywords", "recommendation"])
def test_the_network_of_an_examples_train_script_is_the_one_whose_weights_lie_beside_it(field):
    import importlib

    from examples.weights import load

    script = importlib.import_module(f"examples.{field}.train")
    assert script.WEIGHTS.parent.name == field
    load(script.untrained(), script.WEIGHTS)
    assert script.SETTINGS.epochs >= 1
