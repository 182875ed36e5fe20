"""A block in eval mode leaves every part of a module in the mode that it was in, whatever happens in it."""

import pytest
import torch
from torch import nn

from penjing.modes import in_eval_mode


class Merging(nn.Module):
    """Its weights are others in eval mode, as those of a merged adapter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.merged = False

    def train(self, mode=True):
        if mode == self.merged:
            self.merged = not mode
            self.weight.data += 1.0 if self.merged else -1.0
        return super().train(mode)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("part", [True, False])
def test_each_part_gets_its_own_mode_back(whole, part):
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)).train(whole)
    module[1].training = part
    with pytest.raises(ZeroDivisionError), in_eval_mode(module):
        assert not any(m.training for m in module.modules())
        raise ZeroDivisionError
    assert [m.training for m in module.modules()] == [whole, whole, part]


def test_what_a_module_does_by_itself_in_eval_mode_is_undone():
    module = Merging()
    with in_eval_mode(module):
        assert float(module.weight.detach()) == 2
    assert float(module.weight.detach()) == 1 and module.training


def test_an_exported_program_has_one_mode_and_keeps_it():
    module = torch.export.export(nn.Linear(2, 2).eval(), (torch.zeros(1, 2),)).module()
    before = [m.training for m in module.modules()]
    with in_eval_mode(module):
        module(torch.zeros(1, 2))
    assert [m.training for m in module.modules()] == before
