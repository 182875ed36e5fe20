"""The SOURCE that a command names, with the weights that it is to have."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from penjing.errors import SourceError, TaskError
from penjing.tasks.usercode import check_file

if TYPE_CHECKING:
    from penjing.sources.source import Source


def check_files(parsed: argparse.Namespace) -> None:
    """Raise if a Python file that the command names is missing, before anything heavy is imported."""
    check_file(parsed.source, error=SourceError, role="source")
    if parsed.task:
        check_file(parsed.task, error=TaskError, role="task")


def source(parsed: argparse.Namespace) -> str | Source:
    """The SOURCE as it was named; where it gets weights from a file, opened with them."""
    if parsed.weights is None and not parsed.ignore_weights:
        return str(parsed.source)
    from penjing.sources.source import open_source

    return open_source(parsed.source, weights=parsed.weights, ignore=parsed.ignore_weights)
