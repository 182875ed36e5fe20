"""Every technique before every other, on a small trained network: an artifact that answers as torch, or a reason."""

import copy

import pytest

from penjing.errors import DecompositionError, QuantizationError, RecipeError, SharingError
from penjing.recipes.catalogue import CATALOGUE
from penjing.recipes.recipe import Recipe
from tests import pairs

pytest.importorskip("onnxruntime")
NAMES = tuple(pairs.TECHNIQUES)
ORDERS = [(first, second) for first in NAMES for second in NAMES]
ZEROS = {name for name, (family, _) in pairs.TECHNIQUES.items() if family == "zeros"}
UNFIT = {  # legal orders whose second step can't take what the first leaves of this network, and says so when it runs
    ("prune.Iterative", "share.Layers"),  # layers of other widths
    *((first, f"share.ProductCodebook{more}") for first in ZEROS for more in ("", ", two levels")),
    ("share.Layers", "decompose.LowRank"),
    *((first, "quantize.Binary") for first in ZEROS),  # binary weights have no 0
}
PARITY_DB = 35  # 120 and more is fp32's rounding; less where a value between two integers fell to the other side


def refused(first, second):
    """What `check` says about an order, before anything is computed; None where it is legal."""
    try:
        Recipe(*pairs.steps(first, second)).check()
    except RecipeError as error:
        return error
    return None


LEGAL = [order for order in ORDERS if refused(*order) is None and order not in UNFIT]


def one_per_family():
    """The first legal order of every two families."""
    orders = {}
    for first, second in LEGAL:
        orders.setdefault((pairs.TECHNIQUES[first][0], pairs.TECHNIQUES[second][0]), (first, second))
    return list(orders.values())


FEW = one_per_family()


@pytest.fixture(scope="module")
def data():
    return pairs.task()


@pytest.fixture(scope="module")
def source(data):
    return pairs.trained(data)


EVERY = [pytest.param(*order, id="-".join(order)) for order in FEW]
EVERY += [pytest.param(*order, id="-".join(order), marks=pytest.mark.slow) for order in LEGAL if order not in FEW]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), sorted(UNFIT))
def test_what_the_first_leaves_and_the_second_cannot_take_is_told(first, second, source, data, tmp_path):
    with pytest.raises((DecompositionError, QuantizationError, SharingError)) as refusal:
        pairs.artifact(Recipe(*pairs.steps(first, second)), copy.deepcopy(source), data, tmp_path)
    assert refusal.value.expected and refusal.value.remedy


@pytest.mark.parametrize(("first", "second"), EVERY)
def test_a_legal_order_gives_a_file_that_answers_as_torch(first, second, source, data, tmp_path):
    figures = pairs.artifact(Recipe(*pairs.steps(first, second)), copy.deepcopy(source), data, tmp_path)
    assert figures["snr_db"] >= PARITY_DB
    families = {pairs.TECHNIQUES[name][0] for name in (first, second)}
    assert figures["integers"] == bool(families & {"integers", "repair"})


def test_every_step_is_in_the_matrix():
    listed = {name for step in pairs.TECHNIQUES.values() for name, kind in CATALOGUE.items() if type(step[1]) is kind}
    assert listed == set(CATALOGUE)


def test_what_is_refused_says_why():
    for first, second in ORDERS:
        error = refused(first, second)
        if error is not None:
            text = f"{error.what} {error.expected}"
            assert error.expected and "support" not in text, f"{first} → {second}: {error}"


def test_orders_without_a_contradiction_are_legal():
    families = {order: tuple(pairs.TECHNIQUES[name][0] for name in order) for order in ORDERS}
    free = {"training", "channels", "zeros"}
    for order, (one, two) in families.items():
        if {one, two} <= free or (one in free and two in ("equalization", "integers", "repair")):
            assert order in LEGAL or order in UNFIT or "Regularized" in order[0], order
