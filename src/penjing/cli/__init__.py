"""The command line."""

from penjing.cli.commands import entry, main

__all__ = ["entry", "main"]
