"""What a runtime accelerates on a device: what it has for that processor, and the device's profile allows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from penjing.errors import TargetError
from penjing.steps.plan import Capabilities, Formats, QuantSpec
from penjing.targets.profile import NumberFormats, Target

INTEGERS = ("int8", "int8-bf16", "int8-fp16")


def narrowed(target: Target, capabilities: Capabilities) -> Capabilities:
    """The part of a runtime's capabilities that a device has too.

    Args:
        target: The device.
        capabilities: Of the runtime, for `target.instruction_sets`.

    Raises:
        TargetError: The runtime makes no precision that runs there.
    """
    precisions = tuple(p for p in capabilities.precisions if p in target.precisions)
    notes = capabilities.notes + tuple(note for note in target.notes if note not in capabilities.notes)
    weight = _preferred(capabilities.weight, capabilities.weights, target.weights)
    activation = _preferred(capabilities.activation, capabilities.activations, target.activations)
    if weight is None or activation is None:
        what = "weights" if weight is None else "activations"
        notes += (f"{capabilities.runtime} and {target.name} have no integer format of {what} in common",)
        precisions = tuple(p for p in precisions if p not in INTEGERS)
    if not precisions:
        raise TargetError(
            f"{capabilities.runtime} makes nothing that {target.name} runs",
            code="no-precision",
            got=f"{capabilities.runtime}: {', '.join(capabilities.precisions)}",
            expected=f"{target.name}: {', '.join(target.precisions)}"
            + ("" if weight and activation else ", in an integer format that both have"),
            remedy=f"another of its runtimes: {', '.join(target.runtimes)}",
        )
    dynamic, kinds = capabilities.dynamic, capabilities.integer | capabilities.recurrent
    return replace(
        capabilities,
        precisions=precisions,
        weight=weight or capabilities.weight,
        activation=activation or capabilities.activation,
        integer=_common(capabilities.integer, target),
        quantized_output=_common(capabilities.quantized_output, target),
        recurrent=_common(capabilities.recurrent, target),
        weights=_both(capabilities.weights, target.weights),
        activations=_both(capabilities.activations, target.activations),
        dynamic=None if dynamic is not None and target.activations.refusal(dynamic) else dynamic,
        notes=notes,
        device=target.name,
        withheld=frozenset() if target.integer is None else kinds - target.integer,
    )


def _common(kinds: frozenset[str], target: Target) -> frozenset[str]:
    return kinds if target.integer is None else kinds & target.integer


def _both(runtime: Formats, device: NumberFormats) -> Formats:
    """The formats that a runtime and a device have in common; signedness is the preferred format's."""
    return replace(
        runtime,
        bits=tuple(b for b in runtime.bits if b in device.bits),
        symmetric=tuple(s for s in runtime.symmetric if s in device.symmetric),
        per=tuple(p for p in runtime.per if p in device.per),
    )


def _preferred(spec: QuantSpec, runtime: Formats, device: NumberFormats) -> QuantSpec | None:
    """The format nearest to the runtime's own that both have; None where there is none."""
    return next((s for s in _near(spec, device) if runtime.refusal(s) is None and device.refusal(s) is None), None)


def _near(spec: QuantSpec, device: NumberFormats) -> Iterator[QuantSpec]:
    """The format on scales that the device has, then with fewer bits, one scale a tensor, and another zero point."""
    spec = replace(spec, scale=spec.scale if spec.scale in device.scale else device.scale[0])
    axes = (spec.axis, None) if spec.axis is not None else (None,)
    for bits in sorted((b for b in device.bits if b <= spec.bits), reverse=True):
        for axis in axes:
            for symmetric in dict.fromkeys((spec.symmetric, *device.symmetric)):
                for signed in dict.fromkeys((spec.signed, *device.signed)):
                    if symmetric and not signed:
                        continue  # without a zero point, unsigned integers have no negative value
                    same = (symmetric, signed) == (spec.symmetric, spec.signed)
                    # Files have no type for -127..127 of activations, and a clip would separate what is fused.
                    narrow = spec.narrow if same or spec.axis is not None else False
                    yield replace(spec, bits=bits, axis=axis, symmetric=symmetric, signed=signed, narrow=narrow)
