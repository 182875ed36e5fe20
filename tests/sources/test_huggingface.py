import json
import shutil

import pytest
import torch

from penjing.errors import CheckpointError, SourceError
from penjing.sources.source import check_forward, open_source
from penjing.tasks.task import Task
from tests.raises import raises_case

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, num_labels=3, **sizes)
    torch.manual_seed(0)
    network = transformers.BertForSequenceClassification(config)
    network.save_pretrained(folder)
    return folder, network.eval()


@pytest.fixture
def folder(bert, tmp_path):
    shutil.copytree(bert[0], tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_folder_opens_with_its_own_weights(bert):
    source = open_source(str(bert[0]))
    assert source.name == "tiny-bert" and not source.module.training
    ids = torch.randint(0, 50, (3, 7))
    assert torch.equal(source.module(ids).logits, bert[1](ids).logits)


def test_it_brings_its_example(bert):
    source = open_source(bert[0])
    assert check_forward(source, Task(example=source.example)).logits.shape[-1] == 3


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"auto_map": {"AutoModel": "evil.Net"}}, "auto_map"),
        ({"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}}, "auto_map"),
        ({"attn_implementation": "somebody/kernel"}, "somebody/kernel"),
        ({"_attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ],
)
def test_code_from_elsewhere_is_refused(folder, entries, word):
    edit(folder, **entries)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with raises_case(CheckpointError, "foreign-code") as caught:
        open_source(folder)
    assert word in caught.value.got


def test_adapters_are_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with raises_case(CheckpointError, "adapter"):
        open_source(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    with raises_case(CheckpointError, "pickle") as caught:
        open_source(folder)
    assert "save_pretrained" in caught.value.remedy


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with raises_case(SourceError, "no-weights"):
        open_source(folder)


@pytest.mark.parametrize("name", ["BertForSequenceClasification", "pipeline", "os", "AutoModel.from_pretrained"])
def test_a_class_that_transformers_has_not(folder, name):
    edit(folder, architectures=[name])
    with raises_case(SourceError, "unknown-class") as caught:
        open_source(folder)
    assert repr(name) in caught.value.what
    if name.startswith("Bert"):
        assert "BertForSequenceClassification" in caught.value.remedy


@pytest.mark.parametrize("names", [None, [], "Bert", [3]])
def test_a_config_without_a_class(folder, names):
    edit(folder, architectures=names)
    with raises_case(SourceError, "no-class"):
        open_source(folder)


def test_weights_of_another_class_are_not_filled_with_random_numbers(folder):
    edit(folder, architectures=["BertForQuestionAnswering"])
    with raises_case(SourceError, "incomplete") as caught:
        open_source(folder)
    assert "qa_outputs" in caught.value.got


def test_weights_of_another_size(folder):
    edit(folder, hidden_size=32)
    with raises_case(SourceError, "unloadable"):
        open_source(folder)


def test_a_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with raises_case(SourceError, "unreadable"):
        open_source(folder)


def test_an_example_picture_has_the_size_of_the_configuration(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    assert open_source(tmp_path / "vit").example["pixel_values"].shape == (2, 3, 16, 16)


def test_the_files_of_a_tokenizer_are_not_read(folder):
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    (folder / "vocab.json").write_text("{")
    assert open_source(folder).example is not None
    (folder / "generation_config.json").write_text("{")
    with raises_case(SourceError, "unreadable"):
        open_source(folder)
