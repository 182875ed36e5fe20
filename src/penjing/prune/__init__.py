"""Pruning: weights that matter least are removed. One method, one file."""

from penjing.prune.channels import Channels

__all__ = ["Channels"]
