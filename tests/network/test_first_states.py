"""A stored first state of a recurrent layer serves every batch, or it is refused with the name of the layer."""

import pytest
import torch
from torch import nn

import penjing as pj
from penjing.errors import ExportError
from penjing.network.capture import capture_network
from penjing.pipeline import building
from penjing.records.manifest import read_manifest
from penjing.runtimes import isolated
from penjing.runtimes.artifact import predictor
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from tests.raises import raises_case

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}
CELLS = {"lstm_cell": nn.LSTMCell, "gru_cell": nn.GRUCell, "rnn_tanh_cell": nn.RNNCell}


class Started(nn.Module):
    """A layer or a cell that starts from stored states: `rows` of them."""

    def __init__(self, operator, rows, checked=False):
        super().__init__()
        torch.manual_seed(0)
        self.operator, self.checked = operator, checked
        self.part = (LAYERS | CELLS)[operator](3, 4)
        shape = (1, rows, 4) if operator in LAYERS else (rows, 4)
        for name in ("hidden", "cell"):
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        return self.run(x, self.hidden, self.cell)

    def run(self, x, hidden, cell):
        state = (hidden, cell) if "lstm" in self.operator else hidden
        if self.checked:
            result = self.part(x, state)
        elif self.operator in LAYERS:  # torch's own operator: nothing compares the batches
            settings = (True, 1, 0.0, False, False, False)
            result = getattr(torch._VF, self.operator)(x, state, self.part._flat_weights, *settings)
        else:
            part = self.part
            weights = (part.weight_ih, part.weight_hh, part.bias_ih, part.bias_hh)
            result = getattr(torch.ops.aten, self.operator)(x, state, *weights)
        return result[0] if isinstance(result, tuple) else result


def sequences(n):
    return torch.randn(5, n, 3, generator=torch.Generator().manual_seed(n))


DYNAMIC = {"x": {1: "batch"}}


@pytest.mark.parametrize("operator", LAYERS)
def test_one_row_is_the_state_of_every_sample(operator):
    model = Started(operator, 1).eval()
    network = capture_network(model, (sequences(1),), dynamic=DYNAMIC)
    for n in (1, 2, 7):
        states = [state.repeat(1, n, 1) for state in (model.hidden, model.cell)]
        torch.testing.assert_close(network(sequences(n)), model.run(sequences(n), *states))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_it_is_the_state_of_every_sample_in_a_runtime(runtime, tmp_path):
    model, task = Started("lstm", 1).eval(), pj.Task(example=sequences(1), dynamic=DYNAMIC)
    network = capture_network(model, *task.call(), dynamic=DYNAMIC)
    structure = flatten_outputs(network(*task.call()[0]))[1]
    building.build(Draft(network), runtime, "fp32", task, structure, tmp_path)
    predict = predictor(isolated.open_artifact(tmp_path, 1), read_manifest(tmp_path))
    states = [state.repeat(1, 3, 1) for state in (model.hidden, model.cell)]
    answer = torch.as_tensor(predict(sequences(3).numpy()))
    torch.testing.assert_close(answer, model.run(sequences(3), *states), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checked", [False, True], ids=["by the operator", "by the layer"])
@pytest.mark.parametrize("operator", LAYERS)
def test_rows_of_a_batch_are_refused_with_the_name_of_the_layer(operator, checked):
    model = Started(operator, 2, checked=checked).eval()
    for n in (1, 2, 3):
        with raises_case(ExportError, "state-batch") as caught:
            capture_network(model, (sequences(n),), dynamic=DYNAMIC)
        assert ("the layer part" if checked else "the layer Started") in str(caught.value)
        assert "Task.dynamic" in caught.value.remedy


@pytest.mark.parametrize("operator", CELLS)
def test_a_cell_that_refuses_its_state_is_named(operator):
    with raises_case(ExportError, "state-batch") as caught:
        capture_network(Started(operator, 2, checked=True).eval(), (torch.randn(2, 3),))
    assert "the layer part" in str(caught.value)


@pytest.mark.parametrize("operator", LAYERS)
def test_beside_a_fixed_batch_any_state_is_taken_and_no_other_batch(operator):
    model = Started(operator, 2).eval()
    network = capture_network(model, (sequences(2),), dynamic={})
    torch.testing.assert_close(network(sequences(2)), model(sequences(2)))
    with pytest.raises(RuntimeError):
        network(sequences(3))


def test_a_state_that_is_an_input_of_a_fixed_batch_is_refused():
    class Given(Started):
        def forward(self, x, hidden, cell):
            return self.run(x, hidden, cell)

    call = (sequences(2), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    with raises_case(ExportError, "state-batch"):
        capture_network(Given("lstm", 1).eval(), call, dynamic=DYNAMIC)
