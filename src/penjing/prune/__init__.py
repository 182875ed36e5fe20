"""Pruning: weights that matter least are removed. One method, one file."""

from penjing.prune.channels import Channels
from penjing.prune.iterative import Iterative

__all__ = ["Channels", "Iterative"]
