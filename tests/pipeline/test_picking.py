"""``--runtime auto``: one runtime is picked by timing the source, and the whole run is for it."""

import pytest

import penjing as pj
from penjing import runtimes
from penjing.tasks.opening import open_task

pytestmark = pytest.mark.skipif(len([n for n in runtimes.DEPLOYED if runtimes.installed(n)]) < 2, reason="one runtime")


def test_the_run_is_for_one_runtime_and_says_why(digits_task, digits_source, tmp_path):
    result = pj.compress(
        digits_source, open_task(digits_task), recipe=pj.quantize.Static(), runtime="auto", out=tmp_path, seconds=0.05
    )
    record = result.record
    (name,) = {candidate.runtime for candidate in record.candidates}
    (told,) = [text for text in record.warnings if text.startswith("the runtime is ")]
    times = {part.split(" ms in ")[1]: float(part.split(" ms in ")[0]) for part in told.split(" takes ")[1].split(", ")}
    assert set(times) == set(runtimes.DEPLOYED) and name == min(times, key=times.get) == told.split()[3].rstrip(":")
    assert any(step.name == "pick a runtime" for step in record.steps)
