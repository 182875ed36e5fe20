import importlib.util
import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from penjing.errors import CheckpointError, MissingDependency, SourceError
from penjing.sources.source import check_forward, in_single_precision, open_source
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
        ({"attn_implementation": {"": "somebody/kernel"}}, "somebody/kernel"),
        ({"_attn_implementation": {"text_config": {"": "somebody/kernel"}}}, "somebody/kernel"),
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
    with raises_case(SourceError, "misfit") as caught:
        open_source(folder)
    assert "LayerNorm.weight: [16] in the file, [32] in the network" in caught.value.got


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


def split(folder, place):
    """The weights in a file of another name, and an index that says they are at `place`."""
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = load_file(folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, place)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_in_several_files(folder, bert):
    split(folder, "part.safetensors")
    ids = torch.randint(0, 50, (3, 7))
    assert torch.equal(open_source(folder).module(ids).logits, bert[1](ids).logits)


@pytest.mark.parametrize(
    "place",
    ["../outside.safetensors", "/dev/zero", "pytorch_model.bin", "sub/part.safetensors", "..\\x.safetensors", "", 3],
)
def test_an_index_names_files_of_its_folder(folder, tmp_path, place):
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    split(folder, place)
    with raises_case(SourceError, "unreadable" if place == 3 else "outside") as caught:
        open_source(folder)
    assert place == 3 or repr(place) in caught.value.got


@pytest.mark.parametrize("name", ["../outside.safetensors", "x.bin", ["x"], "sub/x.safetensors"])
def test_a_configuration_names_weights_of_its_folder(folder, name):
    edit(folder, transformers_weights=name)
    with raises_case(CheckpointError, "outside"):
        open_source(folder)


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": 3, "metadata": {}}, {"weight_map": {"a": "part.safetensors"}}]
)
def test_an_index_that_is_none(folder, index):
    split(folder, "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with raises_case(SourceError, "unreadable"):
        open_source(folder)


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"max_position_embeddings": 1 << 26}, "position_embeddings.weight [67108864, 16]"),  # 4 GiB
        ({"num_labels": 1 << 26}, "num_labels"),  # Transformers writes a name for each
        ({"id2label": {str(i): "" for i in range(200_000)}}, "classifier.weight [200000, 16]"),
        ({"num_hidden_layers": -3}, "num_hidden_layers"),
        ({"architectures": ["CLIPModel"]}, "CLIPModel"),  # of its usual size
    ],
)
def test_a_network_that_is_larger_than_its_weights_is_not_built(folder, entries, word, monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *a, **k: pytest.fail("built"))
    edit(folder, **entries)
    with raises_case(SourceError, "misfit") as caught:
        open_source(folder)
    assert word in caught.value.got


def test_tables_that_are_computed_row_by_row_are_not(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 0}
    config = transformers.MarianConfig(vocab_size=60, max_position_embeddings=32, **sizes, **heads, **ids)
    transformers.MarianMTModel(config).save_pretrained(tmp_path)
    edit(tmp_path, max_position_embeddings=1 << 24)
    with raises_case(SourceError, "misfit"):
        open_source(tmp_path)


def test_what_a_class_does_not_read_is_told(folder):
    edit(folder, architectures=["BertModel"])
    source = open_source(folder)
    assert len(source.notes) == 1 and "classifier.weight" in source.notes[0]
    _, _, note = in_single_precision(source, Task(example=source.example))
    assert source.notes[0] in note


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_integers_are_no_weights(folder, dtype):
    state = load_file(folder / "model.safetensors")
    save_file({k: v.to(dtype) for k, v in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    with raises_case(SourceError, "not-floats"):
        open_source(folder)


def test_a_class_that_needs_another_package(folder):
    if importlib.util.find_spec("timm") is not None:
        pytest.skip("timm is installed")
    edit(folder, architectures=["TimmWrapperModel"])
    with raises_case(MissingDependency, "not-installed") as caught:
        open_source(folder)
    assert "timm" in caught.value.got


def test_the_hub_is_not_asked_for_a_network_that_a_configuration_names(folder, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("asked the network"))
    edit(folder, architectures=["DPTForDepthEstimation"], model_type="dpt", backbone="somebody/network")
    with raises_case(SourceError, "unloadable") as caught:
        open_source(folder)
    assert "offline" in caught.value.got.lower()
