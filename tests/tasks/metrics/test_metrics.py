import numpy as np
import pytest

from penjing.tasks import metrics

RANDOM = np.random.default_rng(0)


def test_auc_is_that_of_scikit_learn():
    judge = pytest.importorskip("sklearn.metrics")
    scores, relevant = RANDOM.integers(0, 9, 200) / 9, RANDOM.integers(0, 2, 200)  # with many ties
    assert metrics.auc(scores, relevant) == pytest.approx(judge.roc_auc_score(relevant, scores), abs=1e-12)


def test_hit_rate_and_ndcg_are_those_of_the_obvious_loop():
    groups = RANDOM.permutation(np.repeat(np.arange(15), 20))
    scores, relevant = RANDOM.normal(size=300), (RANDOM.random(300) < 0.12).astype(int)
    hits, gains = [], []
    for group in range(15):
        rows = np.flatnonzero(groups == group)
        order = relevant[rows[np.argsort(-scores[rows])]]
        if order.any():
            hits.append(order[:10].any())
            best = np.sort(order)[::-1][:10]
            discount = 1 / np.log2(np.arange(10) + 2)
            gains.append((order[:10] * discount).sum() / (best * discount).sum())
    assert metrics.hit_rate(scores, relevant, groups, 10) == pytest.approx(np.mean(hits))
    assert metrics.ndcg(scores, relevant, groups, 10) == pytest.approx(np.mean(gains))


def test_equal_scores_do_not_pay():
    scores, relevant, groups = np.zeros(20), np.r_[1, np.zeros(19)].astype(int), np.zeros(20, int)
    assert metrics.hit_rate(scores, relevant, groups, 10) == 0.0
    places = metrics.ranks(np.zeros((1, 20)), [np.array([0])])
    assert places[0].tolist() == [19]


def test_retrieval_of_known_places():
    similarity = np.array([[0.9, 0.8, 0.1, 0.5], [0.1, 0.2, 0.3, 0.4]])
    places = metrics.ranks(similarity, [np.array([1, 2]), np.array([3])])
    assert [place.tolist() for place in places] == [[1, 3], [0]]
    assert metrics.recall_at(places, 2) == pytest.approx((0.5 + 1) / 2)
    assert metrics.reciprocal_rank(places) == pytest.approx((0.5 + 1) / 2)
    one = (1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    assert metrics.ndcg_at(places, 4) == pytest.approx((one + 1) / 2)


def test_cosine_of_rows_of_any_length():
    rows = metrics.cosine(np.array([[2.0, 0.0], [0.0, 0.0]]), np.array([[1.0, 1.0], [-5.0, 0.0]]))
    np.testing.assert_allclose(rows, [[np.sqrt(0.5), -1.0], [0.0, 0.0]])


def test_iou_and_dice_of_classes():
    truth, predicted = np.array([[0, 0, 1, 1, 255]]), np.array([[0, 1, 1, 1, 2]])
    table = metrics.confusion(predicted, truth, classes=4, ignore=255)
    assert table.sum() == 4
    assert metrics.mean_iou(table) == pytest.approx((1 / 2 + 2 / 3) / 2)  # classes 2 and 3 are nowhere
    assert metrics.mean_dice(table) == pytest.approx((2 / 3 + 4 / 5) / 2)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-A I-A O B-A", {("A", 0, 2), ("A", 3, 4)}),
        ("I-A I-A I-B", {("A", 0, 2), ("B", 2, 3)}),
        ("B-A B-A I-B", {("A", 0, 1), ("A", 1, 2), ("B", 2, 3)}),
        ("S-A B-B E-B S-A", {("A", 0, 1), ("B", 1, 3), ("A", 3, 4)}),
        ("B-A E-A I-A", {("A", 0, 2), ("A", 2, 3)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_of_a_sequence(tags, expected):
    assert metrics.entities(tags.split()) == expected


def test_entity_f1_counts_whole_entities():
    truth = [["B-A", "I-A", "O"], ["B-B", "O", "O"]]
    predicted = [["B-A", "O", "O"], ["B-B", "O", "B-A"]]
    assert metrics.entity_f1(predicted, truth) == pytest.approx(2 * 1 / (3 + 2))
    assert metrics.entity_f1([["O"]], [["O"]]) == 1.0


def test_what_can_not_be_compared_is_the_least_similar():
    similarity = np.array([[np.nan, 0.1, -0.9], [0.3, np.nan, np.nan]])
    places = metrics.ranks(similarity, [np.array([0]), np.array([0, 2])])
    assert [place.tolist() for place in places] == [[2], [0, 2]]


@pytest.mark.parametrize(
    ("predicted", "truth", "word"),
    [([3], [0], "predicted"), ([-1], [0], "predicted"), ([0], [3], "truth")],
)
def test_classes_that_are_none_are_not_counted_elsewhere(predicted, truth, word):
    with pytest.raises(ValueError, match=word):
        metrics.confusion(np.array(predicted), np.array(truth), classes=3)


def test_sequences_and_detections_of_two_lengths():
    with pytest.raises(ValueError, match="2 tags"):
        metrics.entity_f1([["B-A"]], [["B-A", "O"]])
    with pytest.raises(ValueError, match="2 scores"):
        metrics.Detections(np.zeros((1, 4)), np.zeros(2), np.zeros(1))
