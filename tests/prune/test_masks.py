import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penjing.errors import RecipeError
from penjing.prune.masks import Pattern, check_scope, fraction, keep, keep_each, removed_count
from tests.raises import raises_case, raises_setting

SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 19)),
    st.tuples(st.integers(1, 6), st.integers(1, 11), st.integers(1, 3), st.integers(1, 3)),
)
SPARSITY = st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.7, 0.9, 0.99])


def drawn(shape, seed=0):
    """Few different values: ties are the rule."""
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


@given(SHAPES, SPARSITY, st.integers(0, 99))
def test_free_weights_go_as_a_sort_by_score_and_place_says(shape, sparsity, seed):
    scores = drawn(shape, seed)
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    slow = torch.ones(len(flat), dtype=torch.bool)
    slow[order[: removed_count(sparsity, len(flat))]] = False
    assert torch.equal(keep(scores, sparsity), slow.reshape(shape))


@given(SHAPES, SPARSITY, st.integers(0, 99))
def test_rows_lose_the_same_number_each(shape, sparsity, seed):
    mask = keep(drawn(shape, seed), sparsity, scope="row").flatten(1)
    assert set((~mask).sum(1).tolist()) == {removed_count(sparsity, mask.shape[1])}


@pytest.mark.parametrize(("sparsity", "count", "removed"), [(0.29, 100, 29), (0.5, 5, 2), (0.99, 10, 9), (0.7, 10, 7)])
def test_counts_are_rounded_down(sparsity, count, removed):
    assert removed_count(sparsity, count) == removed


@given(SHAPES, st.sampled_from(["1:2", "2:4", "1:4", "4:8", "3:5"]), st.integers(0, 99))
def test_n_of_every_m_input_channels_stay_and_a_short_end_stays_whole(shape, pattern, seed):
    n, m = map(int, pattern.split(":"))
    scores = drawn(shape, seed)
    mask = keep(scores, fraction(None, pattern), pattern)
    lines, values = (x.reshape(*shape[:2], -1).permute(0, 2, 1).reshape(-1, shape[1]) for x in (mask, scores))
    whole = shape[1] // m * m
    assert lines[:, whole:].all()
    groups, sizes = lines[:, :whole].reshape(-1, m), values[:, :whole].reshape(-1, m)
    assert (groups.sum(1) == n).all()
    for group, size in zip(groups, sizes, strict=True):
        assert size[group].min() >= size[~group].max()


@given(SHAPES, SPARSITY, st.sampled_from([(1, 4), (4, 1), (2, 2)]), st.sampled_from(["per_layer", "row"]))
def test_blocks_go_as_a_whole_and_the_edges_stay(shape, sparsity, block, scope):
    rows, columns = block
    mask = keep(drawn(shape), sparsity, f"{rows}x{columns}", scope)
    high, wide = shape[0] // rows, shape[1] // columns
    matrices = mask.reshape(*shape[:2], -1).permute(2, 0, 1)
    assert matrices[:, high * rows :].all() and matrices[:, :, wide * columns :].all()
    whole = matrices[:, : high * rows, : wide * columns]
    whole = whole.reshape(len(matrices), high, rows, wide, columns).sum((2, 4))
    assert set(whole.flatten().tolist()) <= {0, rows * columns}
    gone = (whole == 0).transpose(0, 1).flatten(1)  # (rows of blocks, others)
    if scope == "row" and gone.numel():
        assert set(gone.sum(1).tolist()) <= {removed_count(sparsity, gone.shape[1])}
    else:
        assert gone.sum() == removed_count(sparsity, gone.numel())


def test_the_block_with_the_smallest_sum_goes_first():
    scores = torch.tensor([[9.0, 0, 1, 1], [5, 5, 3, 0]])  # sums 9, 2, 10, 3
    assert keep(scores, 0.5, "1x2").tolist() == [[True, True, False, False], [True, True, False, False]]


def test_layers_are_compared_with_each_other_where_that_is_asked_for():
    scores = {"a": torch.tensor([[1.0, 2], [3, 4]]), "b": torch.full((3, 1, 2), 2.0)}
    masks = keep_each(scores, 0.5, scope="global")
    assert sum(int((~mask).sum()) for mask in masks.values()) == 5
    assert masks["a"].tolist() == [[False, False], [True, True]]
    assert masks["b"].flatten().tolist() == [False, False, False, True, True, True]  # of equal ones the first
    assert keep_each(scores, 0.5)["a"].tolist() == masks["a"].tolist()
    assert keep_each({}, 0.5, scope="global") == {}


@pytest.mark.parametrize("text", ["2/4", "4:4", "4:2", "0:4", "1x1", "0x4", "2:4 ", "", "dense", 3])
def test_patterns_that_do_not_exist_are_named(text):
    with raises_setting("pattern"):
        Pattern.parse(text)


def test_sparsity_follows_from_the_pattern():
    assert fraction(None, "unstructured") == fraction(None, "1x4") == 0.5
    assert fraction(None, "1:4") == fraction(0.75, "1:4") == 0.75
    with raises_case(RecipeError, "contradiction") as caught:
        fraction(0.5, "1:4")
    assert caught.value.field == "sparsity"
    for wrong in (1, -0.1, "half", True, float("nan")):
        with raises_setting("sparsity"):
            fraction(wrong, "unstructured")


def test_scopes_that_a_pattern_has_no_use_for_are_refused():
    check_scope("global", "unstructured")
    with raises_case(RecipeError, "contradiction") as caught:
        check_scope("global", "2:4")
    assert caught.value.field == "scope"
    with raises_setting("scope"):
        check_scope("layer", "unstructured")
