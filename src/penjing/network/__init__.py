"""The captured form: capturing a network, reading its graph, exporting it again."""

from penjing.network.capture import raise_network

__all__ = ["raise_network"]
