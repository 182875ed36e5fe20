"""Pruning: the least important channels, blocks or weights are removed. One technique, one file."""

from penjing.prune.blocks import Blocks
from penjing.prune.channels import Channels
from penjing.prune.gradual import Gradual
from penjing.prune.iterative import Iterative
from penjing.prune.magnitude import Magnitude
from penjing.prune.movement import Movement
from penjing.prune.regularized import Regularized
from penjing.prune.sparsegpt import SparseGPT
from penjing.prune.wanda import Wanda

__all__ = ["Blocks", "Channels", "Gradual", "Iterative", "Magnitude", "Movement", "Regularized", "SparseGPT", "Wanda"]
