"""What a device profile says, as values."""

from __future__ import annotations

from dataclasses import dataclass

from penjing.steps.plan import Formats, QuantSpec, Refusal

ANY = "any"
"""In a profile: every kind of operator that the runtime has."""


@dataclass(frozen=True, kw_only=True)
class NumberFormats:
    """The integers that a device's kernels take; each field lists the values of a `QuantSpec` field that are legal.

    >>> NumberFormats(bits=(8,), symmetric=(True,), signed=(True,), per=("tensor",)).refusal(QuantSpec(signed=False))
    Refusal(got='unsigned integers', takes='signed')
    """

    bits: tuple[int, ...]
    symmetric: tuple[bool, ...]
    signed: tuple[bool, ...]
    per: tuple[str, ...]
    scale: tuple[str, ...] = ("free", "power_of_two")

    def refusal(self, spec: QuantSpec) -> Refusal | None:
        """The part of the spec that the device does not have, or None."""
        if spec.signed not in self.signed:
            words = {True: "signed", False: "unsigned"}
            return Refusal(f"{words[spec.signed]} integers", words[not spec.signed])
        if spec.scale not in self.scale:
            return Refusal(f"scales that are {spec.scale}", " or ".join(self.scale))
        return Formats(bits=self.bits, symmetric=self.symmetric, per=self.per).refusal(spec)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What fits into a device.

    Attributes:
        storage_bytes: For the artifact's files (flash); None: no limit that the profile knows.
        memory_bytes: For what a call needs (RAM); None: no limit that the profile knows.
        weights_in: "memory" where the weights are read into the RAM, "storage" where they are read from where they lie.
    """

    storage_bytes: int | None
    memory_bytes: int | None
    weights_in: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """A compiler that judges artifacts for a device, and what it is told.

    Attributes:
        compiler: "vela", Arm's compiler for the Ethos-U.
        accelerator: Its `--accelerator-config`.
        system: Its `--system-config`.
        memory: Its `--memory-mode`.
    """

    compiler: str
    accelerator: str
    system: str
    memory: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A document, and the fact that it is given for."""

    fact: str
    at: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device profile.

    Attributes:
        name: As users write it.
        description: One line.
        runtimes: That run on it, the preferred one first, as `penjing runtimes` names them.
        instruction_sets: Of its processor, spelled as `penjing runtimes` spells this machine's.
        cores: Of its processor.
        precisions: Of whole artifacts that it runs.
        legal: Kinds of operator that an artifact may have at all; None: every one.
        integer: Kinds with integer kernels there; None: all that the runtime has.
        weights: Formats of quantized weights.
        activations: Formats of quantized activations.
        limits: What fits into it.
        check: The compiler that artifacts are checked with; None where there is none.
        commands: What is done with the artifact on the way to the device, as command lines.
        notes: Sentences for the user.
        sources: Where the facts come from.
        sha256: Of the profile's text.
    """

    name: str
    description: str
    runtimes: tuple[str, ...]
    instruction_sets: tuple[str, ...]
    cores: int
    precisions: tuple[str, ...]
    legal: frozenset[str] | None
    integer: frozenset[str] | None
    weights: NumberFormats
    activations: NumberFormats
    limits: Limits
    check: Check | None
    commands: tuple[str, ...]
    notes: tuple[str, ...]
    sources: tuple[Source, ...]
    sha256: str
