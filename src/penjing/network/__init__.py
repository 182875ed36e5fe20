"""The captured form: capturing a network, reading its graph, exporting it again."""

from penjing.network.capture import capture_network

raise_network = capture_network  # its name in earlier scripts

__all__ = ["capture_network", "raise_network"]
