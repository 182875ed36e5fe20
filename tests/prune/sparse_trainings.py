"""A network for digits that is trained while its weights go."""

import torch

from penjing.network.capture import capture_network
from penjing.steps.draft import Draft
from penjing.train.finetune import Finetune
from tests.trainings import EVERY_STEP, net

TRAINING = Finetune(epochs=5, learning_rate=0.05, autocast="off", save_every_s=EVERY_STEP)  # 20 steps


COUNT = 8 * 9 + 1280


def draft():
    return Draft(capture_network(net().eval(), (torch.zeros(1, 1, 8, 8),)))


def zeros(network):
    return sum(int((network.get_submodule(name).weight == 0).sum()) for name in ("conv", "head"))
