"""The folder that `Result.save_pretrained` writes, and optimum's own classes on it."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import penjing as pj
from penjing import records
from penjing.errors import ArtifactError, OutputError, SourceError
from penjing.pipeline.compress import Result
from tests.raises import raises_case

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very", "not"]
SENTENCES = ["very good film", "not good", "bad bad film not good"]

OPTIMUM = """
import json, sys
import numpy as np
from transformers import AutoTokenizer
from {module} import {kind}

model = {kind}.from_pretrained(sys.argv[1]{more})
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
batch = tokenizer(json.loads(sys.argv[2]), padding=True, return_tensors="pt", return_token_type_ids=False)
print(json.dumps(np.asarray(model(**batch).logits.detach()).tolist()))
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny classifier with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, num_labels=3, **sizes)
    network = transformers.BertForSequenceClassification(config)
    torch.nn.init.normal_(network.classifier.weight)
    network.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_evil.py").write_text("raise SystemExit\n")
    return folder, tokenizer, network.eval()


def batch_of(tokenizer, sentences):
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def result(request, bert, tmp_path_factory):
    pytest.importorskip(request.param)
    folder, tokenizer, _ = bert
    axes = {0: "batch", 1: "tokens"}
    task = pj.Task(
        example=batch_of(tokenizer, SENTENCES), dynamic={"input_ids": axes, "attention_mask": axes},
        calibration=[batch_of(tokenizer, SENTENCES)],
    )  # fmt: skip
    return pj.run(
        pj.Recipe(pj.quantize.Static()), str(folder), task, runtime=request.param, goal="minimize size_bytes",
        out=tmp_path_factory.mktemp("runs") / "run", seconds=0.05, threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(result, tmp_path_factory):
    return result.save_pretrained(tmp_path_factory.mktemp("saved") / "tiny")


def runtime_of(result):
    return result.record.chosen.runtime


def test_the_files_are_those_that_optimum_reads(result, saved, bert):
    model = {"onnxruntime": {"model.onnx"}, "openvino": {"openvino_model.xml", "openvino_model.bin"}}
    names = {path.name for path in saved.iterdir()}
    assert model[runtime_of(result)] | {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert not {"modeling_evil.py", "model.safetensors", "manifest.json", "load.py"} & names
    assert (saved / "config.json").read_bytes() == (bert[0] / "config.json").read_bytes()


def test_transformers_itself_reads_configuration_and_tokenizer(saved, bert):
    assert transformers.AutoConfig.from_pretrained(saved).num_labels == 3
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    assert tokenizer(SENTENCES)["input_ids"] == bert[1](SENTENCES)["input_ids"]


def test_the_file_opens_with_its_runtime_by_the_names_of_transformers(result, saved, bert):
    batch = {name: tensor.numpy() for name, tensor in batch_of(bert[1], SENTENCES).items()}
    with torch.no_grad():
        expected = bert[2](**batch_of(bert[1], SENTENCES)).logits.numpy()
    if runtime_of(result) == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(saved / "model.onnx"), providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], batch)
    else:
        import openvino

        logits = openvino.Core().compile_model(str(saved / "openvino_model.xml"), "CPU")(batch)["logits"]
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_optimum_itself_loads_it(result, saved, bert):
    """`PENJING_OPTIMUM_<RUNTIME>`: folders with optimum, where it needs another transformers than the one here."""
    runtime = runtime_of(result)
    module, kind = {"onnxruntime": ("optimum.onnxruntime", "ORTModel"), "openvino": ("optimum.intel", "OVModel")}[
        runtime
    ]
    kind += "ForSequenceClassification"
    path = os.environ.get(f"PENJING_OPTIMUM_{runtime.upper()}", "")
    environment = {**os.environ, "PYTHONPATH": path}
    here = subprocess.run([sys.executable, "-c", f"from {module} import {kind}"], capture_output=True, env=environment)
    if here.returncode:
        pytest.skip(f"{module} can't be imported beside this transformers")
    code = OPTIMUM.format(module=module, kind=kind, more="")
    told = subprocess.run(
        [sys.executable, "-c", code, str(saved), json.dumps(SENTENCES)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr[-2000:]
    logits = np.array(json.loads(told.stdout.strip().splitlines()[-1]))
    with torch.no_grad():
        expected = bert[2](**batch_of(bert[1], SENTENCES)).logits.numpy()
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_the_readme_opens_it(result, saved):
    text = (saved / "README.md").read_text()
    assert "ForSequenceClassification.from_pretrained" in text and "`attention_mask`" in text and "`logits`" in text
    compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec")


def test_what_can_not_be_saved(result, saved, bert, tmp_path):
    with raises_case(OutputError, "exists"):
        result.save_pretrained(saved)
    elsewhere = Result(result.record, result.folder)
    with raises_case(SourceError, "not-pretrained"):
        elsewhere.save_pretrained(tmp_path / "a")
    with raises_case(SourceError, "not-pretrained"):
        elsewhere.save_pretrained(tmp_path / "a", source=tmp_path)
    assert not (tmp_path / "a").exists()
    assert (elsewhere.save_pretrained(tmp_path / "b", source=bert[0]) / "config.json").is_file()
    torch_run = tmp_path / "run"
    (torch_run / "artifact").mkdir(parents=True)
    manifest = json.loads((result.artifact / "manifest.json").read_text()) | {"runtime": "torch"}
    (torch_run / "artifact" / "manifest.json").write_text(json.dumps(manifest))
    for name in records.manifest.read_manifest(result.artifact).files():
        (torch_run / "artifact" / name).write_bytes(b"")
    with raises_case(ArtifactError, "not-for-optimum"):
        replace(result, folder=torch_run).save_pretrained(tmp_path / "c")


def test_a_source_that_is_open_keeps_its_folder(bert):
    from penjing.pipeline.compress import pretrained_folder
    from penjing.sources.source import open_source

    class Order:
        model = open_source(bert[0])

    assert pretrained_folder(Order) == Path(bert[0]).resolve()


def test_a_folder_that_can_not_be_filled_is_left_empty(result, tmp_path, monkeypatch):
    def full(source, target):
        Path(target).write_text("half")
        if Path(target).suffix in (".onnx", ".xml"):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with raises_case(OutputError, "unwritable") as caught:
            result.save_pretrained(tmp_path / "saved")
    assert "pretrained" in caught.value.what and "--resume" not in caught.value.remedy
    assert list((tmp_path / "saved").iterdir()) == []
    assert (result.save_pretrained(tmp_path / "saved") / "README.md").is_file()


def test_links_to_elsewhere_are_not_copied_and_those_of_a_cache_are(result, bert, tmp_path):
    snapshot = tmp_path / "models--tiny" / "snapshots" / "abc"
    shutil.copytree(bert[0], snapshot)
    (tmp_path / "models--tiny" / "blobs").mkdir()
    (snapshot / "config.json").rename(tmp_path / "models--tiny" / "blobs" / "0123")
    (snapshot / "config.json").symlink_to("../../blobs/0123")
    saved = result.save_pretrained(tmp_path / "a", source=snapshot)
    assert (saved / "config.json").read_bytes() == (bert[0] / "config.json").read_bytes()
    assert not (saved / "config.json").is_symlink()
    (tmp_path / "secret").write_text("mine")
    (snapshot / "merges.txt").symlink_to(tmp_path / "secret")
    with raises_case(SourceError, "link") as caught:
        result.save_pretrained(tmp_path / "b", source=snapshot)
    assert "merges.txt" in caught.value.what and not (tmp_path / "b").exists()


def test_a_configuration_that_can_not_be_read_is_told(result, tmp_path):
    for text in ("[]", "{"):
        (tmp_path / "config.json").write_text(text)
        with raises_case(SourceError, "not-pretrained") as caught:
            result.save_pretrained(tmp_path / "a", source=tmp_path)
        assert "config.json: not" in caught.value.got
