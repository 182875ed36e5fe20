"""The captured form of a network: capturing it, reading its graph, exporting it again."""

from penjing.network.capture import capture_network

raise_network = capture_network  # the name in earlier versions

__all__ = ["capture_network", "raise_network"]
