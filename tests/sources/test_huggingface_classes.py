"""Classes of transformers from a folder to an artifact: opened, captured, exported and compared, fp32."""

import json

import numpy as np
import pytest
import torch

from penjing import runtimes
from penjing.errors import PenjingError
from penjing.pipeline.building import build
from penjing.pipeline.repeatable import capture_repeatable
from penjing.records.manifest import read_manifest
from penjing.sources.source import check_forward, open_source
from penjing.steps.draft import Draft
from penjing.tasks.outputs import flatten_outputs
from penjing.tasks.task import Task
from tests.sources.huggingface_classes import EXPORTED, QUICK, REFUSED

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

BOUND = 1e-4  # of the largest output


def saved(folder, name, configuration, settings):
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(**settings)
    network = getattr(transformers, name)(config).eval()
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXPORTED]
)
def test_a_class_opens_with_an_example_and_its_artifact_agrees(tmp_path, name):
    configuration, settings, inputs = EXPORTED[name]
    network = saved(tmp_path / "model", name, configuration, settings)
    source = open_source(tmp_path / "model")
    assert list(source.example) == inputs.split()
    task = Task(example=source.example)
    outputs = check_forward(source, task)
    with torch.no_grad():
        expected = network(**source.example)
    main = next(iter(outputs))
    assert torch.equal(outputs[main], expected[main])  # the weights are those of the folder
    captured = capture_repeatable(source, task)
    leaves, structure = flatten_outputs(outputs)
    build(Draft(captured), "onnxruntime", "fp32", task, structure, tmp_path)
    session = runtimes.open_artifact(tmp_path, 1)
    (program,) = read_manifest(tmp_path).programs
    assert [port.name for port in program.inputs] == inputs.split() and program.outputs[0].name == main
    assert {port.shape[0] for port in program.inputs} == {"batch"}
    inputs = [tensor.numpy() for tensor in source.example.values()]
    for got, leaf in zip(session.run(inputs), leaves, strict=True):
        reference = leaf.detach().numpy()
        assert np.abs(got - reference).max() <= BOUND * np.abs(reference).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_those_that_can_not_be_exported_say_why(tmp_path, name):
    configuration, settings, code, _ = REFUSED[name]
    saved(tmp_path / "model", name, configuration, settings)
    source = open_source(tmp_path / "model")
    with pytest.raises(PenjingError) as caught:
        capture_repeatable(source, Task(example=source.example))
    assert caught.value.code == code


def test_the_size_of_an_image_is_what_the_preprocessor_makes(tmp_path):
    saved(tmp_path, "ResNetForImageClassification", *EXPORTED["ResNetForImageClassification"][:2])

    def size(settings):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        return list(open_source(tmp_path).example["pixel_values"].shape[2:])

    assert size({}) == [224, 224]
    assert size({"size": {"height": 32, "width": 48}}) == [32, 48]
    assert size({"size": {"shortest_edge": 40}}) == [40, 40]
    assert size({"size": 50, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}) == [32, 32]
    assert size({"size": {"height": 10**9, "width": "x"}}) == [224, 224]
    assert size([]) == [224, 224]


def test_inputs_that_are_not_known_are_left_to_the_task(tmp_path):
    config = transformers.LlamaConfig(**EXPORTED["LlamaForCausalLM"][1])
    config.save_pretrained(tmp_path)
    from penjing.sources import huggingface_examples

    class Odd(torch.nn.Module):
        main_input_name = "smell"

        def __init__(self):
            super().__init__()
            self.config = config

        def forward(self, smell):
            return smell

    assert huggingface_examples.example(Odd(), {}) is None
