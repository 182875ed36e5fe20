"""Reading device profiles: data of a stranger until every field has been looked at."""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penjing.errors import TargetError, UsageError
from penjing.records import reading, yaml_text
from penjing.targets.profile import ANY, Check, Limits, NumberFormats, Source, Target

PROFILES = Path(__file__).parent / "profiles"
PROFILE_BYTES = 1 << 16
SUFFIXES = (".yaml", ".yml")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8-bf16", "int8-fp16")
COMPILERS = ("vela",)
_EXAMPLE = "`penjing targets pi4 --yaml` prints a complete profile to start from"

_FIELDS = {
    "name": "a word",
    "description": "a line",
    "runtimes": "a list of words, such as [onnxruntime]",
    "instruction_sets": "a list of words, such as [neon, dotprod]; [] where there are none",
    "cores": "a whole number from 1",
    "precisions": f"a list of some of {', '.join(PRECISIONS)}",
    "operators": "a mapping with legal and integer",
    "formats": "a mapping with weights and activations",
    "limits": "a mapping with storage_bytes, memory_bytes and weights_in",
    "check": "null, or a mapping with compiler, accelerator, system and memory",
    "commands": "a list of lines; [] where there are none",
    "notes": "a list of lines; [] where there are none",
    "sources": "a list of mappings with fact and at",
}
_OPERATORS = {
    "legal": f"{ANY}, or a list of kinds of operator, such as [conv, linear]",
    "integer": f"{ANY}, or a list of kinds of operator, such as [conv, linear]",
}
_FORMATS = dict.fromkeys(("weights", "activations"), "a mapping with bits, symmetric, signed, per and scale")
_NUMBERS = {
    "bits": "a list of whole numbers from 1 to 16",
    "symmetric": "[true], [false] or [true, false]",
    "signed": "[true], [false] or [true, false]",
    "per": "a list of some of tensor, channel, group",
    "scale": "a list of some of free, power_of_two",
}
_LIMITS = {
    "storage_bytes": "a whole number from 1, or null",
    "memory_bytes": "a whole number from 1, or null",
    "weights_in": "memory or storage",
}
_CHECK = {
    "compiler": f"one of {', '.join(COMPILERS)}",
    "accelerator": "a word, such as ethos-u55-128",
    "system": "a word, such as Ethos_U55_High_End_Embedded",
    "memory": "a word, such as Shared_Sram",
}
_SOURCE = {"fact": "a line", "at": "an address or a document"}


@functools.cache
def names() -> tuple[str, ...]:
    """The profiles of this package."""
    return tuple(sorted(path.stem for path in PROFILES.glob("*.yaml")))


def load(name: str | Path) -> Target:
    """A profile by its name, or from a file of the user's own (.yaml).

    Raises:
        UsageError: There is no such profile.
        TargetError: The file is not a profile; names the field.
    """
    text = str(name)
    if not text.lower().endswith(SUFFIXES):
        if text not in names():
            near = difflib.get_close_matches(text, names(), n=1)
            raise UsageError(
                "the target is unknown",
                code="unknown-target",
                got=repr(text),
                expected=f"one of {', '.join(names())}, or a file .yaml",
                remedy=f"did you mean {near[0]}?" if near else "`penjing targets` lists them",
            )
        return parsed(read(PROFILES / f"{text}.yaml"), text)
    return parsed(read(Path(text)), text)


def read(path: Path) -> str:
    """The text of a profile.

    Raises:
        TargetError: It can't be read.
    """
    try:
        return reading.text(path, PROFILE_BYTES)
    except (OSError, ValueError) as error:
        raise TargetError(
            "the device profile can't be read",
            code="unreadable",
            got=f"{path}: {getattr(error, 'strerror', None) or error}",
            expected=f"a YAML file of at most {PROFILE_BYTES:,} bytes",
            remedy=_EXAMPLE,
        ) from None


def parsed(text: str, where: str) -> Target:
    """The profile that a text holds.

    Args:
        text: YAML.
        where: Its name in errors.

    Raises:
        TargetError: It is not YAML, or a field is missing, unknown or malformed.
    """
    try:
        data = yaml_text.load(text)
    except (yaml_text.YAMLError, *reading.UNREADABLE) as error:
        raise TargetError(
            f"the device profile {where} is not YAML",
            code="not-yaml",
            got=" ".join(str(error).split())[:300],
            expected="a mapping of fields",
            remedy=_EXAMPLE,
        ) from None
    fields = _Fields(where, "", data, _FIELDS)
    operators = fields.inner("operators", _OPERATORS)
    formats = fields.inner("formats", _FORMATS)
    limits = fields.inner("limits", _LIMITS)
    return Target(
        name=fields.word("name"),
        description=fields.line("description"),
        runtimes=fields.words("runtimes", least=1),
        instruction_sets=fields.words("instruction_sets"),
        cores=fields.count("cores"),
        precisions=fields.words("precisions", among=PRECISIONS, least=1),
        legal=operators.kinds("legal"),
        integer=operators.kinds("integer"),
        weights=_formats(formats.inner("weights", _NUMBERS)),
        activations=_formats(formats.inner("activations", _NUMBERS)),
        limits=Limits(
            storage_bytes=limits.count_or_none("storage_bytes"),
            memory_bytes=limits.count_or_none("memory_bytes"),
            weights_in=limits.one_of("weights_in", ("memory", "storage")),
        ),
        check=None if fields.data["check"] is None else _check(fields.inner("check", _CHECK)),
        commands=fields.lines("commands"),
        notes=fields.lines("notes"),
        sources=tuple(Source(fact=s.line("fact"), at=s.line("at")) for s in fields.rows("sources", _SOURCE)),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def _check(fields: _Fields) -> Check:
    return Check(
        compiler=fields.one_of("compiler", COMPILERS),
        accelerator=fields.word("accelerator"),
        system=fields.word("system"),
        memory=fields.word("memory"),
    )


def _formats(fields: _Fields) -> NumberFormats:
    bits = fields.data["bits"]
    if not isinstance(bits, list) or not bits or not all(type(b) is int and 1 <= b <= 16 for b in bits):
        raise fields.malformed("bits")
    return NumberFormats(
        bits=tuple(bits),
        symmetric=fields.switches("symmetric"),
        signed=fields.switches("signed"),
        per=fields.words("per", among=("tensor", "channel", "group"), least=1),
        scale=fields.words("scale", among=("free", "power_of_two"), least=1),
    )


class _Fields:
    """A mapping of a profile: it has exactly the fields of `shape`, and each is read as what it has to be."""

    def __init__(self, where: str, inside: str, data: Any, shape: Mapping[str, str]) -> None:
        self.where, self.inside, self.shape = where, inside, shape
        if not isinstance(data, dict):
            raise TargetError(
                f"the device profile {where} is malformed",
                code="malformed",
                field=inside,
                got=f"{inside or 'the file'}: {type(data).__name__}",
                expected=f"a mapping with {', '.join(shape)}",
                remedy=_EXAMPLE,
            )
        self.data: dict[str, Any] = data
        for name in shape:
            if name not in data:
                raise TargetError(
                    f"the device profile {where} lacks a field",
                    code="missing-field",
                    field=self._full(name),
                    got=f"{inside or 'the file'} with {', '.join(map(str, data)) or 'nothing'}",
                    expected=f"{self._full(name)}: {shape[name]}",
                    remedy=_EXAMPLE,
                )
        for name in data:
            if name not in shape:
                near = difflib.get_close_matches(str(name), shape, n=1)
                raise TargetError(
                    f"the device profile {where} has a field that no profile has",
                    code="unknown-field",
                    field=self._full(name),
                    got=self._full(name),
                    expected=f"some of {', '.join(shape)}",
                    remedy=f"did you mean {near[0]}?" if near else _EXAMPLE,
                )

    def _full(self, name: object) -> str:
        return f"{self.inside}.{name}" if self.inside else str(name)

    def malformed(self, name: str) -> TargetError:
        """The error of a field that is not what it has to be."""
        return TargetError(
            f"the device profile {self.where} has a malformed field",
            code="malformed",
            field=self._full(name),
            got=f"{self._full(name)}: {self.data[name]!r}"[:300],
            expected=self.shape[name],
            remedy=_EXAMPLE,
        )

    def inner(self, name: str, shape: Mapping[str, str]) -> _Fields:
        return _Fields(self.where, self._full(name), self.data[name], shape)

    def rows(self, name: str, shape: Mapping[str, str]) -> list[_Fields]:
        if not isinstance(self.data[name], list):
            raise self.malformed(name)
        return [_Fields(self.where, f"{self._full(name)}[{i}]", row, shape) for i, row in enumerate(self.data[name])]

    def line(self, name: str) -> str:
        value = self.data[name]
        if not isinstance(value, str) or not value.strip() or "\n" in value.strip():
            raise self.malformed(name)
        return value.strip()

    def lines(self, name: str) -> tuple[str, ...]:
        value = self.data[name]
        if not isinstance(value, list) or not all(isinstance(line, str) and line.strip() for line in value):
            raise self.malformed(name)
        return tuple(" ".join(line.split()) for line in value)

    def word(self, name: str) -> str:
        value = self.line(name)
        if not value.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise self.malformed(name)
        return value

    def words(self, name: str, among: tuple[str, ...] = (), least: int = 0) -> tuple[str, ...]:
        value = self.lines(name)
        if len(value) < least or len(set(value)) < len(value) or (among and not set(value) <= set(among)):
            raise self.malformed(name)
        return value

    def kinds(self, name: str) -> frozenset[str] | None:
        return None if self.data[name] == ANY else frozenset(self.words(name, least=1))

    def switches(self, name: str) -> tuple[bool, ...]:
        value = self.data[name]
        if not isinstance(value, list) or not value or not all(type(one) is bool for one in value):
            raise self.malformed(name)
        return tuple(dict.fromkeys(value))

    def count(self, name: str) -> int:
        value = self.data[name]
        if type(value) is not int or not 1 <= value < 2**63:
            raise self.malformed(name)
        return value

    def count_or_none(self, name: str) -> int | None:
        return None if self.data[name] is None else self.count(name)

    def one_of(self, name: str, among: tuple[str, ...]) -> str:
        value = self.data[name]
        if value not in among:
            raise self.malformed(name)
        return str(value)
