import pytest
import torch
from torch import nn

from penjing.network.capture import capture_network
from penjing.quantize import BiasCorrection, CoordinateRounding, Static
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.tasks.task import Task


class Mixed(nn.Module):
    """A volume convolution, whose patches have no covariance here, a layer without bias, one that is called twice."""

    def __init__(self):
        super().__init__()
        self.volume = nn.Conv3d(1, 4, 3, padding=1)
        self.flat = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.twice = nn.Linear(8, 8)

    def forward(self, x):
        x = self.flat(self.volume(x).mean(2))
        return self.twice(torch.relu(self.twice(x)))


@pytest.mark.parametrize("step, reached", [(CoordinateRounding(), 1), (BiasCorrection(), 1)])
def test_says_how_many_of_the_quantized_layers_it_reaches(step, reached):
    torch.manual_seed(0)
    data = torch.randn(8, 1, 4, 8, 8)
    task, told = Task(example=data[:2], calibration=[data]), []
    context = Context(task=task, events=lambda kind, **values: told.append((kind, values)))
    draft = Static(weight_bits=4)(Draft(capture_network(Mixed().eval(), *task.call())), context)
    quantized = [edge for edge in draft.plan.entries if edge.endswith(":weight")]
    step(draft, context)
    # CoordinateRounding: `flat` alone has patches and one call; BiasCorrection: `volume` alone has a bias and one call.
    assert [v for kind, v in told if kind == "covered"] == [
        {"step": type(step).__name__, "layers": reached, "total": len(quantized)}
    ]
    assert len(quantized) == 4
