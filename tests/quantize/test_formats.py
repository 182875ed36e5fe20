"""Every linear and non-linear format: computed in torch, refused where no kernel takes it, the same in the runtimes."""

import numpy as np
import pytest
import torch
from torch import nn

import penjing as pj
from penjing import runtimes
from penjing.errors import QuantizationError, RecipeError
from penjing.measure import machine
from penjing.network.capture import capture_network
from penjing.numerics.grid import levels, rows
from penjing.pipeline.building import build
from penjing.quantize import Static
from penjing.runtimes import isolated
from penjing.steps.draft import Draft
from penjing.steps.plan import GRIDS, LISTED, Formats, QuantSpec
from penjing.steps.step import Context
from penjing.surgery import freeze, insert
from penjing.tasks.task import Task
from tests.raises import raises_case, raises_setting

SETTINGS = {
    "per tensor": {"weight_per": "tensor"},
    "groups": {"weight_group": 9},
    "4 bits": {"weight_bits": 4, "activation_bits": 4},
    "3 bits": {"weight_bits": 3},
    "2 bits": {"weight_bits": 2},
    "scales that shift": {"scale": "power_of_two"},
    "powers of two": {"weight_bits": 4, "weight_grid": "powers_of_two"},
    "sums of powers of two": {"weight_bits": 4, "weight_grid": "additive_powers_of_two"},
    "few integers": {"weight_entries": 6},
    "asymmetric weights": {"weight_symmetric": False},
    "symmetric activations": {"activation_symmetric": True},
    "activations on powers of two": {"activation_bits": 3, "activation_grid": "powers_of_two"},
}
IN_RUNTIMES = [
    name for name in SETTINGS if name not in ("groups", "asymmetric weights", "activations on powers of two")
]


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()),
        *(nn.Conv2d(8, 18, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(18, 10)),
    ).eval()
    task = Task(example=torch.zeros(2, 3, 12, 12), calibration=[torch.rand(8, 3, 12, 12) for _ in range(3)])
    return Draft(capture_network(model, *task.call())), task


@pytest.mark.parametrize("name", SETTINGS)
def test_every_weight_and_value_lies_on_its_grid(prepared, name):
    draft, task = prepared
    quantized = Static(**SETTINGS[name])(draft, Context(task=task))
    network = insert(quantized.network, quantized.plan)
    with torch.no_grad():
        assert torch.isfinite(network(task.calibration[0])).all()
    for edge, entry in quantized.plan.entries.items():
        scales = torch.tensor(entry.scale)
        if entry.spec.scale == "power_of_two":
            assert torch.equal(torch.log2(scales).round(), torch.log2(scales))
        assert entry.spec.grid in (*GRIDS, LISTED) and len(levels(entry.spec)) <= 2**entry.spec.bits
        if edge.endswith(":weight"):
            weight = draft.network.get_submodule(edge.removesuffix(":weight")).weight
            assert len(rows(weight, entry.spec)) == len(scales)
    if "activation_grid" in SETTINGS[name]:
        with raises_case(QuantizationError, "activation-grid"):
            freeze(quantized.network, quantized.plan)
        return
    with torch.no_grad():
        frozen, simulated = freeze(quantized.network, quantized.plan)(task.calibration[0]), network(task.calibration[0])
    torch.testing.assert_close(frozen, simulated, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", IN_RUNTIMES)
def test_a_runtime_computes_what_torch_computes(prepared, name, runtime, tmp_path):
    draft, task = prepared
    capabilities = runtimes.get(runtime).capabilities(machine(1).instruction_sets)  # 7-bit weights without VNNI
    quantized = Static(**SETTINGS[name])(draft, Context(task=task, capabilities=capabilities))
    build(quantized, runtime, "int8", task, {"kind": "tensor"}, tmp_path)
    x = task.calibration[0]
    with torch.no_grad():
        expected = insert(quantized.network, quantized.plan)(x).numpy()
    (result,) = isolated.open_artifact(tmp_path, 1).run([x.numpy()])
    # A value on the edge between two integers may fall to either side, and moves everything behind it by a step.
    assert np.square(result - expected).sum() < 2e-3 * np.square(expected).sum()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("name", "says"),
    [("groups", "group"), ("asymmetric weights", "asymmetric"), ("activations on powers of two", "grid")],
)
def test_what_no_kernel_takes_is_refused_with_what_it_takes(prepared, name, says, runtime):
    draft, task = prepared
    context = Context(task=task, capabilities=runtimes.get(runtime).capabilities(("avx", "avx512_vnni")))
    with raises_case(RecipeError, "no-kernel") as caught:
        Static(**SETTINGS[name])(draft, context)
    assert says in caught.value.got and caught.value.expected and "pj.apply" in caught.value.remedy
    assert pj.apply(pj.Recipe(Static(**SETTINGS[name])), draft.network, task) is not None


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"weight_grid": "powers_of_two"}, "weight_bits"),
     ({"weight_grid": "additive_powers_of_two", "weight_bits": 7}, "weight_bits"),
     ({"activation_grid": "powers_of_two", "activation_bits": 4}, "activation_bits"),
     ({"weight_group": 0}, "weight_group"), ({"weight_per": "row"}, "weight_per"), ({"scale": "half"}, "scale"),
     ({"weight_entries": 1}, "weight_entries"), ({"weight_entries": 16, "weight_symmetric": False}, "weight_entries"),
     ({"weight_entries": 4, "weight_bits": 4, "weight_grid": "powers_of_two"}, "weight_entries"),
     ({"weight_symmetric": 1.5}, "weight_symmetric"), ({"weight_grid": "logarithmic"}, "weight_grid")],
)  # fmt: skip
def test_formats_that_make_no_sense_are_refused(settings, field):
    with raises_setting(field):
        Static(**settings)


def test_a_format_is_refused_for_the_first_thing_that_does_not_fit():
    formats = Formats(bits=(8,), symmetric=(True,), per=("tensor",), grids=("uniform",))
    assert formats.refusal(QuantSpec()) is None
    assert "4 bits" in formats.refusal(QuantSpec(bits=4)).got
    assert "asymmetric" in formats.refusal(QuantSpec(symmetric=False)).got
    assert "channel" in formats.refusal(QuantSpec(axis=0)).got
    assert "powers_of_two" in formats.refusal(QuantSpec(bits=8, grid="powers_of_two")).got
