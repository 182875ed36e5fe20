"""Device profiles: every one that is shipped, files with faults, and what a runtime keeps of itself on a device."""

import dataclasses
import json
import re

import pytest
import yaml

from penjing import cli, targets
from penjing.errors import TargetError, UsageError
from penjing.records import yaml_text
from penjing.runtimes import onnxruntime, openvino
from penjing.steps.plan import GENERIC, QuantSpec
from penjing.targets.narrowing import narrowed
from penjing.targets.reading import PROFILES, parsed
from tests.raises import raises_case

AMX = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def plain(name="pi4"):
    return yaml_text.load((PROFILES / f"{name}.yaml").read_text())


def text(data):
    return yaml.safe_dump(data)


class TestShipped:
    @pytest.mark.parametrize("name", targets.names())
    def test_every_profile_is_complete_and_names_its_sources(self, name):
        target = targets.load(name)
        assert target.name == name and target.runtimes and target.precisions
        assert target.sources and all(source.fact and source.at for source in target.sources)

    @pytest.mark.parametrize("name", targets.names())
    def test_every_kind_of_operator_is_spelled_as_the_network_spells_it(self, name):
        target = targets.load(name)
        known = GENERIC.integer | GENERIC.fuses | GENERIC.passthrough
        assert target.integer is None or {"conv", "linear"} <= target.integer & known
        assert target.legal is None or (target.integer or frozenset()) <= target.legal

    def test_the_devices_of_the_page_are_those_that_are_there(self):
        assert {"phone", "pi4", "pi5", "microcontroller", "ethos-u55", "edge-tpu", "fpga"} <= set(targets.names())
        assert {"apple-neural-engine", "ascend", "jetson-orin", "x86-avx2"} <= set(targets.names())

    def test_the_microcontroller_has_the_limits_that_it_is_named_for(self):
        limits = targets.load("microcontroller").limits
        assert (limits.storage_bytes, limits.memory_bytes, limits.weights_in) == (512 << 10, 256 << 10, "storage")


class TestFaults:
    @pytest.mark.parametrize("field", sorted(plain()))
    def test_a_missing_field_is_named_with_what_it_has_to_be(self, field):
        data = plain()
        del data[field]
        with raises_case(TargetError, "missing-field") as caught:
            parsed(text(data), "mine.yaml")
        error = caught.value
        assert error.field == field and error.expected.startswith(f"{field}: ")
        assert "mine.yaml" in error.what and error.got and error.remedy

    @pytest.mark.parametrize(
        ("outer", "inner"),
        [(o, i) for o in ("operators", "limits", "check") for i in plain("ethos-u55")[o]] + [("formats", "weights")],
    )
    def test_so_is_one_within_another(self, outer, inner):
        data = plain("ethos-u55")
        del data[outer][inner]
        with raises_case(TargetError, "missing-field") as caught:
            parsed(text(data), "mine.yaml")
        assert caught.value.field == f"{outer}.{inner}"

    def test_an_unknown_field_is_named_with_the_nearest(self):
        with raises_case(TargetError, "unknown-field") as caught:
            parsed(text(plain() | {"runtime": ["onnxruntime"]}), "mine.yaml")
        assert caught.value.remedy == "did you mean runtimes?"

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("cores", 0),
            ("cores", True),
            ("cores", "four"),
            ("name", "two words"),
            ("runtimes", []),
            ("runtimes", "onnxruntime"),
            ("instruction_sets", [1]),
            ("precisions", ["int3"]),
            ("description", ""),
            ("check", "a command"),
            ("sources", "a book"),
            ("notes", {"a": "b"}),
        ],
    )
    def test_a_malformed_field_is_named(self, field, value):
        with raises_case(TargetError, "malformed") as caught:
            parsed(text(plain() | {field: value}), "mine.yaml")
        assert caught.value.field == field and caught.value.expected

    @pytest.mark.parametrize("value", [-1, 0, 1.5, "512 KB", 2**70])
    def test_a_limit_is_a_number_of_bytes(self, value):
        data = plain()
        data["limits"]["memory_bytes"] = value
        with pytest.raises(TargetError):
            parsed(text(data), "mine.yaml")

    @pytest.mark.parametrize("bits", [[], [0], [17], ["8"], 8])
    def test_bits_are_a_list_of_numbers(self, bits):
        data = plain()
        data["formats"]["weights"]["bits"] = bits
        with raises_case(TargetError, "malformed") as caught:
            parsed(text(data), "mine.yaml")
        assert caught.value.field == "formats.weights.bits"

    @pytest.mark.parametrize("written", ["", "[", "a: 1\na: 2", "- pi4", "!!python/object/apply:os.system [id]", "\0"])
    def test_what_is_no_profile_is_refused(self, written):
        with pytest.raises(TargetError):
            parsed(written, "mine.yaml")

    def test_a_file_that_is_not_there_or_too_large(self, tmp_path):
        with raises_case(TargetError, "unreadable"):
            targets.load(tmp_path / "mine.yaml")
        (tmp_path / "large.yaml").write_text("#" * 100_000)
        with raises_case(TargetError, "unreadable"):
            targets.load(tmp_path / "large.yaml")
        with raises_case(TargetError, "unreadable"):
            (tmp_path / "folder.yaml").mkdir()
            targets.load(tmp_path / "folder.yaml")

    def test_an_unknown_name_gets_the_nearest(self):
        with raises_case(UsageError, "unknown-target") as caught:
            targets.load("ethos-u5")
        assert caught.value.remedy == "did you mean ethos-u55?"

    def test_a_profile_of_the_user_is_read_as_one_that_is_shipped(self, tmp_path):
        (tmp_path / "mine.yaml").write_text(text(plain() | {"name": "mine"}))
        mine = targets.load(tmp_path / "mine.yaml")
        assert dataclasses.replace(mine, name="pi4", sha256="") == dataclasses.replace(targets.load("pi4"), sha256="")


class TestNarrowed:
    def test_a_plan_for_a_pi_has_nothing_of_a_server(self):
        server, pi = openvino.capabilities(AMX), openvino.capabilities(targets.load("pi4").instruction_sets)
        assert "bf16" in server.precisions and server.channel_multiple == 16
        there = narrowed(targets.load("pi4"), pi)
        assert there.precisions == tuple(p for p in ("fp32", "fp16", "int8") if p in pi.precisions)
        assert there.channel_multiple == 4

    def test_without_vnni_weights_take_seven_bits(self):
        target = targets.load("x86-avx2")
        assert narrowed(target, onnxruntime.capabilities(target.instruction_sets)).weight.bits == 7
        # ... also where the runtime itself would take 8
        assert narrowed(target, onnxruntime.capabilities(AMX)).weight.bits == 7

    def test_tensorrt_takes_signed_symmetric_activations(self):
        there = narrowed(targets.load("jetson-orin"), onnxruntime.capabilities(("neon",)))
        spec = there.activation
        assert (spec.signed, spec.symmetric, spec.narrow, spec.bits) == (True, True, False, 8)
        assert there.activations.symmetric == (True,)
        assert there.weight == QuantSpec(bits=8, signed=True, symmetric=True, axis=0)
        assert there.dynamic is None  # its ranges would be unsigned

    def test_unsigned_integers_without_a_zero_point_are_never_taken(self):
        spec = narrowed(targets.load("fpga"), onnxruntime.capabilities(("neon",))).activation
        assert targets.load("fpga").activations.signed == (True, False)
        assert (spec.symmetric, spec.signed) == (True, True)

    def test_integer_operators_are_those_that_both_have(self):
        there = narrowed(targets.load("edge-tpu"), GENERIC)
        assert there.integer == GENERIC.integer & targets.load("edge-tpu").integer
        assert there.precisions == ("int8",)

    def test_a_format_that_neither_has_leaves_floating_point(self):
        data = plain()
        data["formats"]["weights"] |= {"symmetric": [False], "signed": [False]}
        odd = parsed(text(data), "odd.yaml")
        there = narrowed(odd, onnxruntime.capabilities(("neon",)))
        assert there.precisions == ("fp32", "fp16") and "no integer format of weights" in there.notes[-1]
        with raises_case(TargetError, "no-precision"):
            narrowed(parsed(text(data | {"precisions": ["int8"]}), "odd.yaml"), onnxruntime.capabilities(("neon",)))


class TestCommand:
    def test_it_lists_all(self, capsys):
        assert cli.main(["targets", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["name"] for row in rows] == list(targets.names())

    def test_in_80_columns_every_name_is_whole(self, capsys):
        assert cli.main(["targets"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        words = set(re.findall(r"[\w-]+", " ".join(lines)))
        profiles = list(map(targets.load, targets.names()))
        assert words >= set(targets.names()) | {name for p in profiles for name in (*p.runtimes, *p.precisions)}

    def test_it_shows_one_with_its_sources(self, capsys):
        assert cli.main(["targets", "ethos-u55"]) == 0
        shown = capsys.readouterr().out
        assert "checked with vela: ethos-u55-128" in shown and "source: " in shown

    def test_what_it_prints_as_yaml_is_a_profile(self, capsys, tmp_path):
        assert cli.main(["targets", "phone", "--yaml"]) == 0
        (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
        assert targets.load(tmp_path / "mine.yaml") == targets.load("phone")

    def test_an_unknown_one_is_a_request_that_is_not_understood(self, capsys):
        assert cli.main(["targets", "pi9"]) == 2
        assert "pi" in capsys.readouterr().err
