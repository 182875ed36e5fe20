import copy
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penjing.architectures import build
from penjing.network.capture import capture_network
from penjing.network.graph import sites
from penjing.quantize.placement import place
from penjing.steps.plan import GENERIC, Entry, Plan, QuantSpec

SPECS = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    signed=st.booleans(),
    symmetric=st.booleans(),
    axis=st.none() | st.integers(0, 3),
    range=st.sampled_from(["minmax", "mse"]),
)
SCALES = st.floats(min_value=1e-12, max_value=1e12, allow_nan=False)
ENTRIES = st.builds(
    Entry,
    SPECS,
    st.lists(SCALES, min_size=1, max_size=5).map(tuple),
    st.lists(st.integers(-128, 255), min_size=1, max_size=5).map(tuple),
)
NAMES = st.text(min_size=1, max_size=20)


@given(st.dictionaries(NAMES, ENTRIES, max_size=6), st.dictionaries(NAMES, st.text(max_size=20), max_size=3))
def test_json_keeps_every_bit(entries, floats):
    plan = Plan(entries, floats)
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    json.loads(text, parse_constant=pytest.fail)  # no NaN, no Infinity


def test_float32_scales_come_back_to_the_bit():
    scales = torch.rand(1000).exp()
    entry = Entry(QuantSpec(axis=0), tuple(scales.tolist()), (0,) * 1000)
    again = Plan.from_json(Plan({"a:weight": entry}).to_json()).entries["a:weight"]
    assert torch.equal(torch.tensor(again.scale, dtype=torch.float32), scales)


def test_json_does_not_depend_on_the_order_of_the_edges():
    entry = Entry(QuantSpec(), (0.5,), (0,))
    one, other = {"a:in0": entry, "b:in0": entry}, {"b:in0": entry, "a:in0": entry}
    assert Plan(one, {"x": "1", "y": "2"}).to_json() == Plan(other, {"y": "2", "x": "1"}).to_json()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("signed", "symmetric"), [(True, True), (True, False), (False, False)])
def test_limits_hold_as_many_integers_as_the_bits_allow(bits, signed, symmetric):
    low, high = QuantSpec(bits=bits, signed=signed, symmetric=symmetric).limits
    assert high - low + 1 == 2**bits - (signed and symmetric)
    assert math.copysign(1, low) == (-1 if signed else 1)
    if signed and symmetric:
        assert low == -high


def test_without_takes_the_sites_out_and_says_why():
    entry = Entry(QuantSpec(), (0.5,), (0,))
    plan = Plan({"a:in0": entry, "a:weight": entry, "a.b:in0": entry, "a@1:in0": entry}, {"c": "no kernel"})
    less = plan.without({"a": "too lossy"})
    assert set(less.entries) == {"a.b:in0", "a@1:in0"}
    assert less.floats == {"c": "no kernel", "a": "too lossy"}
    assert len(plan.entries) == 4  # the plan itself stays


def test_a_plan_is_true_when_it_quantizes_something():
    assert not Plan(floats={"a": "excluded"})
    assert Plan({"a:in0": Entry(QuantSpec(), (0.5,), (0,))})


def test_specs_and_entries_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        Entry(QuantSpec(), (0.5,), (0,)).scale = (1.0,)


def test_edges_survive_a_copy_and_another_raising():
    model, x = build("resnet20"), torch.zeros(1, 3, 16, 16)
    network = capture_network(model, (x,))
    edges = set(place(network, GENERIC, {}).edges)
    for other in (copy.deepcopy(network), capture_network(model, (torch.zeros(4, 3, 32, 32),))):
        assert set(place(other, GENERIC, {}).edges) == edges
        assert {edge.rpartition(":")[0] for edge in edges} <= set(sites(other))
