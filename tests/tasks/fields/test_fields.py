"""The tasks of the fields: what they measure, in which forms they take data, and what they refuse."""

import numpy as np
import pytest
import torch

import penjing as pj
from penjing.errors import TaskError
from penjing.tasks.metrics.boxes import CONVENTIONS
from penjing.tasks.task import calibration_calls
from tests.raises import raises_case

RANDOM = np.random.default_rng(0)
SIDE = 32


def same(x):
    return x


# --- every field ------------------------------------------------------------------------------------------------

SCORES = RANDOM.normal(size=(10, 3)).astype(np.float32)
CLASSES = SCORES.argmax(1)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_whole_data_and_batches_measure_the_same(batch):
    wrong = np.where(np.arange(10) < 3, (CLASSES + 1) % 3, CLASSES)
    whole = pj.tasks.classification((SCORES, wrong), batch=batch)
    cut = [(torch.from_numpy(SCORES[i : i + 4]), torch.from_numpy(wrong[i : i + 4])) for i in (0, 4, 8)]
    assert whole.evaluate(same) == pj.tasks.classification(cut).evaluate(same) == pytest.approx(0.7)


def test_several_inputs_are_a_dict():
    inputs = {"ids": SCORES, "mask": np.ones((10, 3), np.int64)}
    task = pj.tasks.classification((inputs, CLASSES), train=(inputs, CLASSES), output="logits", batch=4)
    assert task.evaluate(lambda ids, mask: {"hidden": mask, "logits": ids}) == 1.0
    assert set(task.call()[1]) == {"ids", "mask"}
    assert sum(len(call[1]["ids"]) for call in calibration_calls(task)) == 10


def test_training_data_is_shuffled_by_torchs_seed_and_calibration_is_not():
    task = pj.tasks.classification((SCORES, CLASSES), train=(SCORES, CLASSES), batch=5)
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(np.concatenate([x for x, _ in task.train]).tolist())
    assert orders[0] == orders[1] != orders[2]
    assert np.concatenate([args[0] for args, _ in calibration_calls(task)]).tolist() == SCORES.tolist()


def test_calibration_may_be_arrays():
    task = pj.tasks.classification((SCORES, CLASSES), calibration=SCORES[:7], batch=4)
    assert [len(args[0]) for args, _ in calibration_calls(task)] == [4, 3]


@pytest.mark.parametrize(
    ("test", "code"),
    [
        ((SCORES, CLASSES[:4]), "lengths"),
        ((SCORES[:0], CLASSES[:0]), "empty"),
        ([], "empty"),
        (SCORES, "no-targets"),
        (7, "no-targets"),
        ([SCORES], "no-targets"),
        ([(SCORES, CLASSES[:4])], "lengths"),
        (iter([(SCORES, CLASSES)]), "read-once"),
    ],
)
def test_data_of_another_form(test, code):
    with raises_case(TaskError, code):
        pj.tasks.classification(test)


@pytest.mark.parametrize(
    ("targets", "answer", "output", "code"),
    [
        (CLASSES, lambda x: x[:, 0], None, "scores"),
        (CLASSES + 3, same, None, "scores"),
        (CLASSES.astype(float), same, None, "targets"),
        (np.eye(3, dtype=int)[CLASSES], same, None, "targets"),
        (CLASSES, lambda x: x * np.nan, None, "not-finite"),
        (CLASSES, lambda x: {"a": x}, "b", "output"),
        (CLASSES, lambda x: (x, x), 2, "output"),
    ],
)
def test_answers_and_targets_that_are_not_classes(targets, answer, output, code):
    with raises_case(TaskError, code):
        pj.tasks.classification((SCORES, targets), output=output).evaluate(answer)


@pytest.mark.parametrize("name", ["classification", "detection", "ranking", "retrieval", "segmentation", "tagging"])
def test_a_misspelt_setting_is_told(name):
    with pytest.raises(TypeError, match="did you mean calibration"):
        getattr(pj.tasks, name)(calibraton=[])


# --- detection --------------------------------------------------------------------------------------------------


def scene(count=6):
    """Images whose channel 0 tells their number, and the objects in them, as corners."""
    targets = []
    for _ in range(count):
        corners = RANDOM.integers(0, SIDE // 2, (3, 2))
        boxes = np.concatenate([corners, corners + RANDOM.integers(3, SIDE // 2, (3, 2))], 1).astype(np.float32)
        targets.append({"boxes": boxes, "labels": np.array([0, 1, 2])})
    images = np.zeros((count, 3, SIDE, SIDE), np.float32) + np.arange(count, dtype=np.float32)[:, None, None, None]
    return images, targets


def finder(targets, convention="xyxy", split=False, objectness=False):
    """A network that finds everything, in a convention, one row an object and two rows of nothing."""
    from tests.tasks.fields.conventions import from_corners

    def predict(images):
        rows = []
        for number in images[:, 0, 0, 0].astype(int):
            boxes = from_corners(targets[number]["boxes"], convention, (SIDE, SIDE))
            scores = 0.9 * np.eye(3)[targets[number]["labels"]]
            certain = np.full((3, 1 if objectness else 0), 0.5)
            detections = np.concatenate([boxes, certain, scores], axis=1)
            rows.append(np.concatenate([detections, np.zeros((2, detections.shape[1]))]))
        rows = np.stack(rows).astype(np.float32)
        return {"boxes": rows[..., :4], "scores": rows[..., 4:]} if split else rows

    return predict


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_detector_that_finds_everything_in_its_convention(convention):
    images, targets = scene()
    task = pj.tasks.detection((images, targets), boxes=convention, batch=4)
    assert task.metric_name == "mAP@0.5:0.95"
    assert task.evaluate(finder(targets, convention)) == pytest.approx(1.0)


def test_boxes_and_scores_apart_objectness_and_a_decoder():
    images, targets = scene()
    assert pj.tasks.detection((images, targets)).evaluate(finder(targets, split=True)) == pytest.approx(1.0)
    with_objectness = pj.tasks.detection((images, targets), objectness=True)
    assert with_objectness.evaluate(finder(targets, objectness=True)) == pytest.approx(1.0)

    def decode(outputs):
        return [(rows[:3, :4], rows[:3, 4:].max(1), rows[:3, 4:].argmax(1)) for rows in outputs]

    assert pj.tasks.detection((images, targets), decode=decode).evaluate(finder(targets)) == pytest.approx(1.0)


def selecting(targets, spare=2):
    """A network with suppression inside: everything, as corners, and padding behind it."""

    def predict(images):
        rows = [targets[number] for number in images[:, 0, 0, 0].astype(int)]
        most = max(len(row["boxes"]) for row in rows) + spare
        given = {
            "boxes": np.zeros((len(rows), most, 4), np.float32),
            "scores": np.zeros((len(rows), most), np.float32),
            "classes": np.full((len(rows), most), -1),
        }
        for i, row in enumerate(rows):
            count = len(row["boxes"])
            given["boxes"][i, :count], given["scores"][i, :count] = row["boxes"], 0.9
            given["classes"][i, :count] = row["labels"]
        return given | {"count": np.array([len(row["boxes"]) for row in rows])}

    return predict


@pytest.mark.parametrize("said", ["xyxy", "cxcywh", "yxyx"])
def test_boxes_that_the_network_has_selected_are_read_by_their_names(said):
    images, targets = scene()
    task = pj.tasks.detection((images, targets), boxes=said, batch=4)
    assert task.evaluate(selecting(targets)) == pytest.approx(1.0)
    twice = [{"boxes": np.repeat(t["boxes"], 2, 0), "labels": np.repeat(t["labels"], 2)} for t in targets]
    assert task.evaluate(selecting(twice)) < 0.9  # its own suppression counts, and nothing is dropped behind it


def test_selected_boxes_in_parts_of_the_image():
    images, targets = scene()
    parts = [{"boxes": t["boxes"] / SIDE, "labels": t["labels"]} for t in targets]
    task = pj.tasks.detection((images, targets), boxes="cxcywh relative")
    assert task.evaluate(selecting(parts)) == pytest.approx(1.0)
    with pytest.raises(pj.PenjingError) as error:
        pj.tasks.detection((images, targets), boxes="cxcywh").evaluate(selecting(parts))
    assert error.value.remedy == 'write detection(..., boxes="xyxy relative")'


def test_selected_boxes_of_another_shape():
    images, targets = scene()

    def raw(images):
        given = selecting(targets)(images)
        return given | {"scores": given["scores"][..., None]}

    with pytest.raises(pj.PenjingError) as error:
        pj.tasks.detection((images, targets)).evaluate(raw)
    assert error.value.code == "selected"
    assert "scores (6, 5, 1)" in error.value.got


def test_padded_targets_are_the_same_as_lists():
    images, targets = scene()
    rows = [np.concatenate([t["boxes"], t["labels"][:, None]], axis=1) for t in targets]
    padded = np.stack([np.concatenate([row, np.full((2, 5), -1)]) for row in rows])
    half = finder(targets[:3] + [{"boxes": t["boxes"] + 3, "labels": t["labels"]} for t in targets[3:]])
    first, second = (pj.tasks.detection((images, truth)).evaluate(half) for truth in (targets, padded))
    assert first == second
    assert 0.3 < first < 1


def test_boxes_that_overlap_a_better_one_of_their_class_are_dropped():
    images, targets = scene(1)
    target = {"boxes": targets[0]["boxes"][:1], "labels": targets[0]["labels"][:1]}
    box = target["boxes"][0]
    rows = np.array([[[*box, 0.9, 0, 0], [*(box + 0.3), 0.8, 0, 0], [*box, 0, 0.7, 0]]], np.float32)
    assert pj.tasks.detection((images, [target]), overlap=0.5).evaluate(lambda x: rows) == pytest.approx(1.0)


@pytest.mark.parametrize("said", CONVENTIONS)
@pytest.mark.parametrize("actual", CONVENTIONS)
def test_a_network_with_boxes_in_another_convention_is_told_which(said, actual):
    images, targets = scene()
    task = pj.tasks.detection((images, targets), boxes=said)
    if said == actual:
        assert task.evaluate(finder(targets, actual)) == pytest.approx(1.0)
        return
    try:
        value = task.evaluate(finder(targets, actual))
    except TaskError as error:
        assert error.code == "convention"
        assert f'boxes="{actual}"' in error.remedy
    else:  # what overlaps enough by chance has a bad figure, and no error
        assert value < 0.5


@pytest.mark.parametrize("actual", [c for c in CONVENTIONS if c not in ("xyxy", "yxyx")])
def test_targets_in_another_convention_are_told_which(actual):
    from tests.tasks.fields.conventions import from_corners

    images, targets = scene()
    strange = [{"boxes": from_corners(t["boxes"], actual, (SIDE, SIDE)), "labels": t["labels"]} for t in targets]
    with raises_case(TaskError, "convention") as caught:
        pj.tasks.detection((images, strange))
    assert f'"{actual}"' in caught.value.got


def test_targets_in_another_convention_of_the_same_scale_are_told():
    images, targets = scene()
    corners = [{"boxes": t["boxes"] / SIDE, "labels": t["labels"]} for t in targets]
    with raises_case(TaskError, "convention") as caught:
        pj.tasks.detection((images, corners), truth="cxcywh relative")
    assert '"xyxy relative"' in caught.value.got


@pytest.mark.parametrize("width", [[0, 1], [0], [1]], ids=["a point", "no width", "no height"])
def test_an_object_without_a_width_is_one_that_nobody_finds(width):
    images, targets = scene()
    targets[0]["boxes"][0, [2 + axis for axis in width]] = targets[0]["boxes"][0, width]
    assert 0.8 < pj.tasks.detection((images, targets)).evaluate(finder(targets)) < 1


@pytest.mark.parametrize(("ahead", "remedy"), [("targets", "in the targets"), ("network", "decode=")])
def test_classes_that_count_from_1_are_told(ahead, remedy):
    images, targets = scene()
    first = [{"boxes": t["boxes"], "labels": np.array([0, 0, 0])} for t in targets]
    second = [{"boxes": t["boxes"], "labels": np.array([1, 1, 1])} for t in targets]
    truth, predicted = (second, first) if ahead == "targets" else (first, second)
    with raises_case(TaskError, "classes") as caught:
        pj.tasks.detection((images, truth)).evaluate(finder(predicted))
    assert remedy in caught.value.remedy


def test_images_without_objects_have_no_precision():
    images, targets = scene(2)
    with raises_case(TaskError, "no-objects"):
        pj.tasks.detection((images, [{"boxes": [], "labels": []}, {**targets[1], "iscrowd": np.ones(3)}]))


@pytest.mark.parametrize(
    "decoded",
    [
        None,
        [None] * 6,
        [(np.zeros((3, 4)), np.zeros(2), np.zeros(3))] * 6,
        [(np.zeros((3, 5)), np.zeros(3), np.zeros(3))] * 6,
        [(np.zeros((3, 4)), np.zeros((3, 1)), np.zeros(3))] * 6,
    ],
)
def test_what_a_decoder_gives_is_checked(decoded):
    task = pj.tasks.detection(scene(), decode=lambda outputs: decoded)
    with raises_case(TaskError, "decode"):
        task.evaluate(lambda x: x)
    nothing = pj.tasks.detection(scene(), decode=lambda outputs: [([], [], [])] * 6)
    assert nothing.evaluate(lambda x: x) == 0


def test_a_broken_detector_is_a_figure_and_not_an_error():
    images, targets = scene()
    task = pj.tasks.detection((images, targets))
    assert task.evaluate(lambda x: finder(targets)(x) * np.array([1, 1, 1, 1, 0, 0, 0], np.float32)) == 0.0


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda t: {"boxes": t["boxes"]}, "target"),
        (lambda t: {"boxes": t["boxes"], "labels": t["labels"][:2]}, "target"),
        (lambda t: t["boxes"], "target"),
        (lambda t: {"boxes": t["boxes"] * np.nan, "labels": t["labels"]}, "target"),
        (lambda t: {"boxes": t["boxes"], "labels": t["labels"] + 0.5}, "target"),
    ],
)
def test_targets_that_are_not_boxes(change, code):
    images, targets = scene()
    with raises_case(TaskError, code):
        pj.tasks.detection((images, [change(target) for target in targets]))


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (lambda x: x[:, 0, :, :4], "rows"),
        (lambda x: np.full((len(x), 5, 7), np.nan, np.float32), "not-finite"),
        (lambda x: np.full((1, 5, 7), 0.5, np.float32), "decode"),
        (lambda x: (np.zeros((len(x), 5, 3)), np.zeros((len(x), 5, 4))), "rows"),
    ],
)
def test_answers_that_are_not_boxes(answer, code):
    images, targets = scene()
    with raises_case(TaskError, code):
        pj.tasks.detection((images, targets)).evaluate(answer)


def test_an_unknown_convention():
    with raises_case(TaskError, "convention"):
        pj.tasks.detection(scene(), boxes="ltrb")


# --- segmentation -----------------------------------------------------------------------------------------------

MASKS = RANDOM.integers(0, 3, (5, 4, 6))
LOGITS = (5 * np.eye(3)[MASKS].transpose(0, 3, 1, 2)).astype(np.float32)


@pytest.mark.parametrize("metric", ["miou", "dice"])
def test_segmentation_by_scores_and_by_classes(metric):
    task = pj.tasks.segmentation((LOGITS, MASKS), classes=3, metric=metric, batch=2)
    assert task.evaluate(same) == task.evaluate(lambda x: x.argmax(1)) == 1.0
    assert task.evaluate(lambda x: -x) < 0.1


def test_two_classes_may_be_one_score():
    masks = MASKS % 2
    logits = (masks[:, None] - 0.5).astype(np.float32)
    task = pj.tasks.segmentation((logits, masks), classes=2)
    assert task.evaluate(same) == 1.0
    both = np.concatenate([np.zeros_like(logits), logits], 1)
    loss = [task.loss(torch.from_numpy(x), torch.from_numpy(masks)).item() for x in (logits, both)]
    assert loss[0] == pytest.approx(loss[1])


def test_pixels_that_do_not_count_do_not():
    masks = MASKS.copy()
    masks[:, 0] = 255
    wrong = LOGITS.copy()
    wrong[:, :, 0] *= -1
    task = pj.tasks.segmentation((wrong, masks), classes=3)
    assert task.evaluate(same) == 1.0
    first, second = (task.loss(torch.from_numpy(x), torch.from_numpy(masks)) for x in (wrong, LOGITS))
    assert first.item() == pytest.approx(second.item())
    assert first.item() < 0.1


@pytest.mark.parametrize(
    ("masks", "code"),
    [(MASKS * 127, "masks"), (MASKS - 1, "masks"), (MASKS[:, None], "masks"), (MASKS.astype(float), "targets")],
)
def test_masks_that_are_not_classes(masks, code):
    with raises_case(TaskError, code):
        pj.tasks.segmentation((LOGITS, masks), classes=3)


@pytest.mark.parametrize("answer", [lambda x: x[:, :2], lambda x: x[:, :, :2], lambda x: x[:, 0]])
def test_answers_that_do_not_fit_the_masks(answer):
    with raises_case(TaskError, "scores"):
        pj.tasks.segmentation((LOGITS, MASKS), classes=3).evaluate(answer)


def test_probabilities_of_two_classes_are_not_scores():
    masks = np.zeros((2, 8, 8), int)
    masks[:, :4] = 1
    task = pj.tasks.segmentation((np.zeros((2, 3, 8, 8), np.float32), masks), classes=2)
    with raises_case(TaskError, "probabilities"):
        task.evaluate(lambda x: masks[:, None] * 0.8 + 0.1)
    assert task.evaluate(lambda x: masks[:, None] * 0.8 - 0.4) == 1.0
    assert task.evaluate(lambda x: np.zeros((2, 1, 8, 8))) == 0.25  # a broken network is a figure


def test_masks_of_which_nothing_counts():
    with raises_case(TaskError, "masks"):
        pj.tasks.segmentation((np.zeros((2, 3, 8, 8), np.float32), np.full((2, 8, 8), 255)), classes=2)


def test_an_unknown_metric_of_segmentation():
    with raises_case(TaskError, "metric"):
        pj.tasks.segmentation((LOGITS, MASKS), classes=3, metric="iou")


# --- tagging ----------------------------------------------------------------------------------------------------

TAGS = ("O", "B-X", "I-X")
TOKENS = np.array([[1, 2, 0, 1], [0, 1, -100, -100]])


def test_tagging_counts_entities_and_leaves_padding_out():
    scores = np.eye(3, dtype=np.float32)[np.maximum(TOKENS, 0)]
    task = pj.tasks.tagging((scores, TOKENS), tags=TAGS)
    assert task.evaluate(same) == 1.0
    scores[0, 1] = [0, 1, 0]  # B-X B-X: two entities in the place of one
    assert task.evaluate(same) == pytest.approx(2 * 2 / (4 + 3))
    assert task.loss(torch.from_numpy(scores), torch.from_numpy(TOKENS)).isfinite()


@pytest.mark.parametrize(
    ("tags", "tokens", "code"),
    [
        (("NOUN", "VERB"), TOKENS, "tags"),
        (TAGS, TOKENS + 2, "targets"),
        (TAGS, TOKENS[0], "lengths"),
        (TAGS, TOKENS.astype(float), "targets"),
    ],
)
def test_tags_of_another_form(tags, tokens, code):
    scores = np.zeros((2, 4, 3), np.float32)
    with raises_case(TaskError, code):
        pj.tasks.tagging((scores, tokens), tags=tags).evaluate(same)


# --- ranking ----------------------------------------------------------------------------------------------------

ROWS = RANDOM.normal(size=(40, 1)).astype(np.float32)
RELEVANT = (ROWS[:, 0] > 0.8).astype(int)
USERS = np.repeat(["a", "b", "c", "d"], 10)


@pytest.mark.parametrize(("metric", "name"), [("auc", "AUC"), ("hr@10", "HR@10"), ("ndcg@5", "NDCG@5")])
def test_ranking_by_its_own_target_is_perfect(metric, name):
    task = pj.tasks.ranking((ROWS, RELEVANT), metric=metric, groups=USERS, batch=7)
    assert task.metric_name == name
    assert task.evaluate(same) == task.evaluate(lambda x: np.concatenate([-x, x], 1)) == 1.0
    assert task.evaluate(lambda x: -x) < (1.0 if metric == "hr@10" else 0.3) or metric == "hr@10"


@pytest.mark.parametrize(
    ("targets", "groups", "metric", "code"),
    [
        (ROWS[:, 0], USERS, "auc", "targets"),
        (RELEVANT * 0, USERS, "auc", "targets"),
        (RELEVANT, None, "hr@10", "groups"),
        (RELEVANT, USERS[:5], "hr@10", "groups"),
        (RELEVANT, USERS, "hr", "metric"),
        (RELEVANT, USERS, "map", "metric"),
    ],
)
def test_rankings_of_another_form(targets, groups, metric, code):
    with raises_case(TaskError, code):
        pj.tasks.ranking((ROWS, targets), metric=metric, groups=groups)


# --- retrieval --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "name"), [("recall@1", "Recall@1"), ("mrr", "MRR"), ("ndcg@3", "NDCG@3")])
def test_retrieval_of_rows_by_themselves(metric, name):
    documents = RANDOM.normal(size=(9, 4)).astype(np.float32)
    queries, relevant = 3 * documents[[4, 2, 7]], np.array([4, 2, 7])
    task = pj.tasks.retrieval(queries, documents, relevant, calibration=[documents], metric=metric, batch=2)
    assert task.metric_name == name
    assert task.evaluate(same) == 1.0
    assert task.evaluate(lambda x: np.ones_like(x)) < 0.5


@pytest.mark.parametrize(
    ("relevant", "metric", "code"),
    [
        ([0, 1], "mrr", "lengths"),
        ([0, 1, 9], "mrr", "relevant"),
        ([0, [], 1], "mrr", "relevant"),
        ([0] * 3, "f1", "metric"),
    ],
)
def test_retrievals_of_another_form(relevant, metric, code):
    documents = np.eye(9, dtype=np.float32)
    with raises_case(TaskError, code):
        pj.tasks.retrieval(documents[:3], documents, relevant, calibration=[documents], metric=metric)


@pytest.mark.parametrize("strange", [np.inf, -np.inf, np.nan])
def test_embeddings_and_scores_that_are_not_finite_have_no_metric(strange):
    rows = np.eye(4, dtype=np.float32)
    retrieval = pj.tasks.retrieval(rows, rows, np.arange(4), calibration=[rows], metric="recall@1")
    ranking = pj.tasks.ranking((rows, np.array([0, 1, 1, 0])))
    for task, width in ((retrieval, 4), (ranking, 1)):
        with raises_case(TaskError, "not-finite"):
            task.evaluate(lambda x, width=width: np.where(x[:, :width] > 0, strange, 0.0))
