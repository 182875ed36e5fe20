"""The command `compare`: several finished runs side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from penjing.cli.console import Terminal
from penjing.errors import OutputError
from penjing.records.comparison import Comparison
from penjing.records.comparison import compare as read_all
from penjing.records.files import write_text
from penjing.records.folder import check_writable


def compare(parsed: argparse.Namespace, messages: Terminal) -> int:
    """Show artifacts and differences, and write picture and page where they are asked for."""
    for name in filter(None, (parsed.picture, parsed.html)):
        check_writable(Path(name))
    several = read_all(parsed.runs)
    _write(parsed, several)
    if parsed.json:
        print(json.dumps(several.to_data(), indent=2))
        return 0
    from penjing.report import runs_table

    out = Terminal()
    for table in runs_table.artifacts(several):
        out.print(table)
    if several.differences:
        for table in runs_table.changes(several):
            out.print(table)
    else:
        out.print("Nothing differs that the records hold.")
    for name in filter(None, (parsed.picture, parsed.html)):
        out.print(f"  {name}", highlight=False, soft_wrap=True, markup=False)
    return 0


def _write(parsed: argparse.Namespace, several: Comparison) -> None:
    if parsed.picture:
        from penjing.report import runs_picture

        drawn = runs_picture.picture(several)
        if drawn is None:
            raise OutputError(
                "the runs can't be drawn",
                code="no-picture",
                got="fewer than two runs whose candidates have figures for both axes",
                expected="a latency or a size, and a metric or a parity, of two runs",
                remedy="leave --picture out: the table shows what was measured",
            )
        _file(parsed.picture, runs_picture.svg(drawn))
    if parsed.html:
        from penjing.report import runs_page

        _file(parsed.html, runs_page.render(several))


def _file(name: str, text: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    write_text(name, text)
