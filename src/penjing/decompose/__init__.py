"""Decomposition: layers are replaced by products of smaller ones. One technique, one file."""

from penjing.decompose.low_rank import LowRank

__all__ = ["LowRank"]
