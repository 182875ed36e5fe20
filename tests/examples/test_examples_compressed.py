"""Every example of a field from the command line, in both runtimes: compressed, judged by its metric, and verified."""

import json
import re

import pytest

from examples import data
from penjing import runtimes
from penjing.cli import main
from penjing.records import read

NETWORKS = {
    "text": "transformer",
    "tagging": "tagger",
    "keywords": "spotter",
    "recommendation": "neumf",
    "segmentation": "unet",
    "detection": "detector",
    "embeddings": "minilm",
}
TIMED = ("latency", "speed-up over the source")  # which other programs on the machine may change
LOST = 0.01  # of the metric, that the chosen artifact may lose; it is the goal's


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("runtime", runtimes.DEPLOYED)
@pytest.mark.parametrize("field", NETWORKS)
def test_an_example_is_compressed_and_its_evidence_holds(field, runtime, tmp_path, capsys):
    source, task = f"examples/{field}/network.py:{NETWORKS[field]}", f"examples/{field}/task.py:task"
    out = tmp_path / "run"
    settings = ["--runtime", runtime, "--threads", "1", "--seconds", "0.2", "--out", str(out)]
    try:
        status = main(["compress", source, "--task", task, "--goal", f"minimize size_bytes, drop<={LOST}", *settings])
    except data.DataUnavailable as error:
        pytest.skip(str(error))
    assert status == 0
    record = read(out)
    by_name = {candidate.name: candidate for candidate in record.candidates}
    assert {f"{runtime}-fp32", f"{runtime}-int8"} <= set(by_name)
    assert record.goal.met
    assert record.artifact.metric >= record.source.metric - LOST  # by `evaluate`; candidates are chosen by `select`
    assert abs(by_name[f"{runtime}-fp32"].measured.metric - record.source_metric) <= 0.002
    assert by_name[f"{runtime}-int8"].integer_operators
    report = (out / "report.html").read_text(encoding="utf-8")
    assert record.metric_name in report
    assert not re.search(r"""(?:src|href)=["']https?:""", report)  # opens without a network
    capsys.readouterr()
    main(["verify", str(out), "--task", task, "--threads", "1", "--seconds", "0.2", "--json"])
    checks = {check["figure"]: check for check in json.loads(capsys.readouterr().out)}
    differ = [check for name, check in checks.items() if check["holds"] is False and name not in TIMED]
    assert not differ
    assert checks[record.metric_name]["holds"]
