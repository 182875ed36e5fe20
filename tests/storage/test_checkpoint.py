import copy
import functools
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from torch import nn

from penjing.architectures import build
from penjing.errors import CheckpointError, OutputError
from penjing.network.capture import capture_network
from penjing.quantize import Static
from penjing.sources.source import open_source, with_declared_axes
from penjing.steps.draft import Draft
from penjing.steps.step import Context
from penjing.storage import checkpoint
from penjing.surgery import insert
from penjing.tasks.outputs import first_output
from penjing.tasks.task import Task
from tests.raises import raises_case

FILES = {"edits.json", "plan.json", "weights.safetensors"}


def images(count=4, channels=3, seed=0):
    return torch.randn(count, channels, 16, 16, generator=torch.Generator().manual_seed(seed))


@functools.cache
def resnet(seed, width=8):
    """A network with lived-in statistics; another seed is another training of the same architecture."""
    torch.manual_seed(seed)
    model = build("resnet20", width=width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return capture_network(model.eval(), (images(1),))


@pytest.fixture(scope="module")
def quantized():
    task = Task(example=images(1), calibration=[images(8)])
    return Static(exclude=("conv1",))(Draft(resnet(0)), Context(task=task))


@pytest.fixture
def folder(quantized, tmp_path):
    checkpoint.save(quantized, tmp_path)
    return tmp_path


def damage(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


class TestRoundTrip:
    def test_the_same_bits_on_another_training_of_the_network(self, quantized, folder):
        source = resnet(seed=1)
        again = checkpoint.load(folder, source)
        x = images(seed=5)
        assert torch.equal(again.network(x), quantized.network(x))
        state, expected = again.network.state_dict(), quantized.network.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[k], expected[k]) for k in expected)

    def test_folded_batch_norms_stay_folded(self, quantized, folder):
        again = checkpoint.load(folder, resnet(seed=1))
        assert again.edits == quantized.edits
        assert [edit["edit"] for edit in again.edits] == ["fold"] * 21
        assert not [m for m in again.network.modules() if isinstance(m, nn.BatchNorm2d)]

    def test_the_plan_and_what_it_computes(self, quantized, folder):
        again = checkpoint.load(folder, resnet(seed=1))
        assert again.plan == quantized.plan
        assert again.plan.floats["conv1"] == "excluded by 'conv1'"
        x = images(seed=5)
        assert torch.equal(insert(again.network, again.plan)(x), insert(quantized.network, quantized.plan)(x))

    def test_the_source_stays_as_it_was(self, folder):
        source = resnet(seed=1)
        before = {k: v.clone() for k, v in source.state_dict().items()}
        checkpoint.load(folder, source)
        assert before.keys() == source.state_dict().keys()
        assert all(torch.equal(before[k], v) for k, v in source.state_dict().items())

    def test_it_still_trains(self, folder):
        network = checkpoint.load(folder, resnet(seed=1)).network
        assert not any(module.training for module in network.modules())
        network(images()).sum().backward()
        assert all(p.grad is not None for p in network.parameters())

    def test_saving_what_was_loaded_gives_the_same_files(self, folder, tmp_path_factory):
        other = tmp_path_factory.mktemp("again")
        checkpoint.save(checkpoint.load(folder, resnet(seed=1)), other)
        assert {p.name for p in other.iterdir()} == {p.name for p in folder.iterdir()} == FILES
        assert all((other / name).read_bytes() == (folder / name).read_bytes() for name in FILES)

    def test_an_older_one_is_replaced(self, folder):
        network = resnet(seed=2)
        checkpoint.save(Draft(network), folder)
        assert torch.equal(checkpoint.load(folder, resnet(seed=1)).network(images()), network(images()))
        assert {p.name for p in folder.iterdir()} == FILES

    def test_it_opens_by_the_name_of_its_folder(self, folder):
        assert checkpoint.load(str(folder), resnet(seed=1)).edits


class TestTiedWeights:
    @staticmethod
    def gpt2(seed, tied=True):
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(seed)
        config = GPT2Config(
            n_layer=1, n_embd=32, n_head=4, vocab_size=99, n_positions=16, use_cache=False, tie_word_embeddings=tied
        )
        return capture_network(GPT2LMHeadModel(config).eval(), (), {"input_ids": torch.zeros(1, 12, dtype=torch.long)})

    def test_they_are_stored_once_and_tied_again(self, tmp_path):
        network = self.gpt2(0)
        checkpoint.save(Draft(network), tmp_path)
        with safe_open(tmp_path / "weights.safetensors", "pt") as stored:
            names = set(stored.keys())
        assert ("lm_head.weight" in names) + ("transformer.wte.weight" in names) == 1
        again = checkpoint.load(tmp_path, self.gpt2(1)).network
        ids = {"input_ids": torch.arange(24).reshape(2, 12)}
        assert torch.equal(again(**ids)["logits"], network(**ids)["logits"])
        assert again.get_submodule("lm_head").weight is again.get_submodule("transformer.wte").weight

    def test_untied_weights_do_not_fit_a_network_that_ties_them(self, tmp_path):
        checkpoint.save(Draft(self.gpt2(0, tied=False)), tmp_path)
        with raises_case(CheckpointError, "misfit") as caught:
            checkpoint.load(tmp_path, self.gpt2(1))
        assert "lm_head.weight" in caught.value.got and "wte.weight" in caught.value.got

    def test_equal_values_are_not_a_tie(self, tmp_path):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].load_state_dict(model[0].state_dict())
        network = capture_network(model.eval(), (torch.zeros(1, 4),))
        checkpoint.save(Draft(network), tmp_path)
        assert json.loads((tmp_path / "edits.json").read_text())["ties"] == {}


class TestAnotherNetwork:
    def test_another_width_is_named(self, folder):
        with raises_case(CheckpointError, "misfit") as caught:
            checkpoint.load(folder, resnet(seed=0, width=4))
        assert "conv1.weight has shape (8, 3, 3, 3), the network's (4, 3, 3, 3)" in caught.value.got
        assert caught.value.remedy

    def test_another_precision_is_named(self, folder):
        model = capture_network(build("resnet20", width=8).eval(), (images(1),)).double()
        with raises_case(CheckpointError, "misfit") as caught:
            checkpoint.load(folder, model)
        assert "float32" in caught.value.got and "float64" in caught.value.got

    def test_another_architecture_is_named_by_the_edit(self, folder):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 10)).eval()
        with raises_case(CheckpointError, "misfit") as caught:
            checkpoint.load(folder, capture_network(model, (images(1),)))
        assert caught.value.got.startswith("{'edit': ")

    def test_missing_and_more_layers_are_named(self, tmp_path):
        def network(*names):
            layers = nn.Sequential()
            for name in names:
                layers.add_module(name, nn.Linear(4, 4))
            return capture_network(layers.eval(), (torch.zeros(1, 4),))

        checkpoint.save(Draft(network("a", "b")), tmp_path)
        with raises_case(CheckpointError, "misfit") as caught:
            checkpoint.load(tmp_path, network("a", "c"))
        assert "lacks c.bias, c.weight; also has b.bias, b.weight" in caught.value.got


class TestDamage:
    @pytest.mark.parametrize("name", sorted(FILES))
    def test_a_missing_file_is_named(self, folder, name):
        (folder / name).unlink()
        with raises_case(CheckpointError, "incomplete") as caught:
            checkpoint.load(folder, resnet(0))
        assert caught.value.got.startswith(f"no {name} in")

    def test_a_missing_folder(self, tmp_path):
        with raises_case(CheckpointError, "incomplete"):
            checkpoint.load(tmp_path / "no", resnet(0))

    @pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"{", b"\xff\xfe\x00"])
    @pytest.mark.parametrize("name", sorted(FILES))
    def test_a_damaged_file(self, folder, name, content):
        damage(folder, name, content)
        with raises_case(CheckpointError, "damaged"):
            checkpoint.load(folder, resnet(0))

    def test_a_cut_file_of_weights(self, folder):
        path = folder / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with raises_case(CheckpointError, "damaged"):
            checkpoint.load(folder, resnet(0))

    @pytest.mark.parametrize(
        "log",
        [{}, [], 3, {"format": 1, "edits": 5, "ties": {}}, {"format": 1, "edits": [3], "ties": {}}]
        + [{"format": 1, "edits": [], "ties": []}, {"format": "1", "edits": [], "ties": {}}],
    )
    def test_a_log_of_another_form(self, folder, log):
        damage(folder, "edits.json", log)
        with raises_case(CheckpointError, "damaged"):
            checkpoint.load(folder, resnet(0))

    def test_a_newer_format(self, folder):
        damage(folder, "edits.json", {"format": 2, "edits": [], "ties": {}})
        with raises_case(CheckpointError, "newer"):
            checkpoint.load(folder, resnet(0))

    def test_a_plan_of_something_else(self, folder):
        damage(folder, "plan.json", {"entries": {"conv1:in0": {"spec": {"bits": 8, "run": 1}}}, "floats": {}})
        with raises_case(CheckpointError, "damaged"):
            checkpoint.load(folder, resnet(0))

    @pytest.mark.parametrize("edit", [{"edit": "run", "code": "1"}, {"edit": "__import__"}, {}])
    def test_an_edit_outside_the_vocabulary_is_refused(self, folder, edit):
        damage(folder, "edits.json", {"format": 1, "edits": [edit], "ties": {}})
        with raises_case(CheckpointError, "unknown-edit") as caught:
            checkpoint.load(folder, resnet(0))
        assert caught.value.got == edit

    @pytest.mark.parametrize("layer", ["__class__", "layer9", "graph", ""])
    def test_an_edit_of_what_is_no_layer_is_refused(self, folder, layer):
        damage(
            folder, "edits.json", {"format": 1, "edits": [{"edit": "fold", "layer": layer, "norm": "bn1"}], "ties": {}}
        )
        with raises_case(CheckpointError, "misfit") as caught:
            checkpoint.load(folder, resnet(0))
        assert f"'layer': {layer!r}" in caught.value.got

    def test_a_pickle_in_place_of_the_weights_does_not_run(self, folder):
        mark = folder / "ran"

        class Malicious:
            def __reduce__(self):
                return mark.touch, ()

        torch.save({"conv1.weight": Malicious()}, folder / "weights.safetensors")
        with raises_case(CheckpointError, "damaged"):
            checkpoint.load(folder, resnet(0))
        assert not mark.exists()


class TestWriting:
    @pytest.mark.skipif(os.name != "posix", reason="files have other permissions there")
    def test_others_may_read_it_as_any_new_file(self, folder):
        (folder / "other").write_text("")
        assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "other").stat().st_mode}

    def test_one_that_is_replaced_is_unfinished_until_the_end(self, folder, quantized):
        """New weights must never stand beside old edits, wherever the save is cut off."""
        (folder / "plan.json").unlink()
        (folder / "plan.json").mkdir()  # the weights are in place when the save stops here
        with pytest.raises(OutputError):
            checkpoint.save(quantized, folder)
        with raises_case(CheckpointError, "incomplete") as caught:
            checkpoint.load(folder, resnet(0))
        assert caught.value.got.startswith("no edits.json")

    def test_a_missing_folder_is_an_output_error(self, quantized, tmp_path):
        with raises_case(OutputError, "unwritable"):
            checkpoint.save(quantized, tmp_path / "no")
        assert not (tmp_path / "no").exists()

    def test_weights_that_cannot_be_put_in_place_leave_nothing_behind(self, quantized, tmp_path):
        (tmp_path / "weights.safetensors").mkdir()
        with pytest.raises(OutputError):
            checkpoint.save(quantized, tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]

    def test_one_without_its_log_of_edits_is_unfinished(self, folder, tmp_path_factory):
        """`edits.json` is written last, so a save that was cut off is known by its absence."""
        half = tmp_path_factory.mktemp("half")
        for name in FILES - {"edits.json"}:
            shutil.copy(folder / name, half)
        with raises_case(CheckpointError, "incomplete"):
            checkpoint.load(half, resnet(0))


def test_a_run_folder_is_restored_from_the_original_model_and_the_task(tmp_path):
    import penjing as pj

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    data = torch.randn(16, 1, 8, 8)
    task = pj.Task(example=data[:2], calibration=[data])
    draft = pj.quantize.Static()(Draft(capture_network(model, *task.call())), Context(task=task))
    checkpoint.save(draft, tmp_path)
    again = pj.load_checkpoint(tmp_path, copy.deepcopy(model), task)
    assert torch.equal(again.network(data), draft.network(data))
    assert again.plan == draft.plan and again.edits == draft.edits


class TestSources:
    """A run begins at a SOURCE, so its checkpoint is reopened with the same words."""

    FACTORY = """
import torch
from torch import nn

class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)).relu().mean(1))

def network():
    torch.manual_seed(0)
    return Reads().eval()
"""

    @pytest.fixture
    def sources(self, tmp_path):
        """The same network as every kind of SOURCE; the length of its texts varies."""
        file = tmp_path / "reads.py"
        file.write_text(self.FACTORY)
        spec = f"{file}:network"
        network = open_source(spec).module
        dim = torch.export.Dim
        axes = ({0: dim("batch", min=1, max=64), 1: dim("length", min=1, max=64)},)
        program = torch.export.export(network, (torch.ones(2, 5, dtype=torch.int64),), dynamic_shapes=axes)
        torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["ids"], output_names=["classes"]
        ).save(tmp_path / "reads.onnx")  # fmt: skip
        return {"factory": spec, "object": network, "program": program, "onnx": tmp_path / "reads.onnx"}

    @pytest.mark.parametrize("form", ["factory", "object", "program", "onnx", "onnx, by its name"])
    def test_every_source_that_runs_reopens(self, sources, tmp_path, form):
        import penjing as pj

        model = str(sources["onnx"]) if form == "onnx, by its name" else sources[form]
        ids = torch.randint(0, 20, (16, 7), generator=torch.Generator().manual_seed(0))
        task = pj.Task(example=ids[:2], calibration=[ids])
        source = open_source(model)
        declared = with_declared_axes(source, task)
        draft = pj.quantize.Static()(
            Draft(capture_network(source.module, *declared.call(), declared.dynamic)), Context(task=declared)
        )
        (tmp_path / "run").mkdir()
        checkpoint.save(draft, tmp_path / "run")
        again = pj.load_checkpoint(tmp_path / "run", model, task)
        longer = torch.cat([ids, ids], 1) if "onnx" in form else ids  # the file says that the length varies
        assert torch.equal(first_output(again.network(longer)), first_output(draft.network(longer)))
        assert again.plan == draft.plan
