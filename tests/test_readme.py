"""The code in the README and in docs/*.md runs: each page in an empty folder of its own, from top to bottom.

Of a page's fenced blocks, those with a title are written to the file of that name, other `python` ones run, and so do
the commands of `sh` ones. Everything else (console, text, yaml without a title) is for the eye.
"""

import itertools
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import forked_workers

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIMIT_S = 280  # of one command
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    kind: str
    title: str | None
    text: str
    line: int  # of the page, where the text begins


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], match[3], text.count("\n", 0, match.start(3)) + 1) for match in FENCE.finditer(text)
    ]


def runs(block):
    return block.title is not None or block.kind in ("python", "sh")


def environment():
    # `penjing` and `python` of the interpreter that runs the tests; two threads, so that no page takes the machine.
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": scripts, "PYTHONPATH": "", "COLUMNS": "120"}


def run_python(group, page, folder):
    """Blocks that follow each other share their names, as in a session; tracebacks show the page's own lines."""
    lines = []
    for block in group:
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    script = folder / f"line_{group[0].line}.py"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    where = f"{page.name}:{group[0].line}"
    if not forked_workers.POSSIBLE:
        return run([sys.executable, script.name], where, folder)
    code, printed, complaints = forked_workers.script_server().run(script, folder, environment(), LIMIT_S)
    assert code == 0, f"{where} failed with {code}\n{printed}\n{complaints}"
    return printed


def run_shell(block, page, folder):
    output = ""
    for command in block.text.replace("\\\n", "").splitlines():
        # 3: the goal or a speed-up was missed, which a busy machine may do to any figure.
        output += run(command, f"{page.name}:{block.line}: {command}", folder, fine=(0, 3))
    return output


def run(command, where, folder, fine=(0,)):
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(),
        shell=isinstance(command, str),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode in fine, f"{where} failed with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_page_runs(page, folder):
    """Every block of the page ends as it should; what they print."""
    output = ""
    for kind, group in itertools.groupby(filter(runs, blocks(page)), key=lambda b: "file" if b.title else b.kind):
        if kind == "python":
            output += run_python(list(group), page, folder)
            continue
        for block in group:
            if kind == "sh":
                output += run_shell(block, page, folder)
            else:
                (folder / block.title).write_text(block.text, encoding="utf-8")
    return output


def test_the_readme_runs_from_top_to_bottom(tmp_path):
    output = assert_page_runs(ROOT / "README.md", tmp_path)
    for run_folder in ("first", "second"):
        folder = tmp_path / "runs" / run_folder
        assert {"artifact", "load.py", "record.json", "report.html"} <= {p.name for p in folder.iterdir()}
    assert "output float32 (1, 10)" in output  # of load.py
    assert "torch.Size([1, 10])" in output  # of pj.apply
    loader = (tmp_path / "runs" / "first" / "load.py").read_text()
    assert not re.search(r"^\s*(import|from) (torch|penjing)", loader, re.MULTILINE)


@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if any(map(runs, blocks(page)))], ids=lambda page: page.name
)
def test_the_code_of_a_page_of_the_documentation_runs(page, tmp_path):
    assert_page_runs(page, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_table_that_a_benchmark_has_written_has_its_place():
    script = runpy.run_path(str(ROOT / "docs" / "measured.py"))
    marks = [mark for page in PAGES for mark in re.findall(r"<!-- (.+?) -->", page.read_text(encoding="utf-8"))]
    opened, closed = marks[::2], marks[1::2]
    assert set(closed) == {"/measured"}
    assert len(opened) == len(closed)
    measured = {name for name in script["TABLES"] if script["written"](name) is not None}
    assert {mark.removeprefix("measured: ") for mark in opened} == measured


def test_the_commands_of_the_readme_are_those_that_exist():
    commands = set(re.findall(r"\| `penjing (\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    shown = run("penjing --help", "penjing --help", ROOT)
    assert commands == set(re.findall(r"^    (\w+) {2,}", shown, re.MULTILINE))


def test_a_block_is_found_with_its_title_and_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('text\n```python title="a.py"\nx = 1\n```\n\n```console\n$ rm\n```\n```sh\nls\n```\n')
    assert blocks(page) == [
        Block("python", "a.py", "x = 1\n", 3),
        Block("console", None, "$ rm\n", 7),
        Block("sh", None, "ls\n", 10),
    ]
    assert [runs(block) for block in blocks(page)] == [True, False, True]
    assert shutil.which("penjing", path=environment()["PATH"])
