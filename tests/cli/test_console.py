import io

import pytest

from penjing.cli.console import Progressing, Terminal

HOSTILE = "[bold]a[/bold] [/red] :smile: \x1b[2J\x1b]0;title\x07 \u202egnp.exe\r"
SHOWN = "[bold]a[/bold] [/red] :smile: ?[2J?]0;title? ?gnp.exe?"


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "stage", "name": HOSTILE},
        {"kind": "source", "metric": 0.5, "metric_name": HOSTILE, "name": HOSTILE},
        {"kind": "candidate", "metric": 0.5, "name": HOSTILE},
        {"kind": "warning", "text": HOSTILE},
        {"kind": "remedy", "name": HOSTILE, "snr_db": 1.0, "kept": True},
        {"kind": "rolled_back", "site": HOSTILE, "reason": HOSTILE},
        {"kind": "covered", "step": HOSTILE, "layers": 1, "total": 2},
        {"kind": "resumed", "candidate": HOSTILE},
        {"kind": "progress", "label": HOSTILE, "done": 1, "total": 2},
    ],
)
def test_names_from_outside_are_neither_markup_nor_control(event):
    console = Terminal(file=io.StringIO(), width=400)
    Progressing(console)(event)
    assert SHOWN in console.file.getvalue()


def test_a_terminal_gets_no_control_character_but_its_own_colours():
    console = Terminal(file=io.StringIO(), width=400, force_terminal=True)
    listener = Progressing(console)
    with listener:
        listener({"kind": "progress", "label": HOSTILE, "done": 1, "total": 2})
    text = console.file.getvalue()
    assert "\x1b[2J" not in text and "\x1b]0;" not in text and "\u202e" not in text and "[bold]a[/bold]" in text
