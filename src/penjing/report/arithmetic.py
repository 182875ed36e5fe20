"""Families of arithmetic: the four groups of precisions that are coloured and counted."""

from __future__ import annotations

import re

from penjing.records import STORED, Candidate, Record
from penjing.report import numbers

INTEGER, HALF, FLOAT, UNSEEN = "integer", "half", "float", "unseen"
TITLES = {INTEGER: "integer", HALF: "bf16 or fp16", FLOAT: "float", UNSEEN: "fused, or not visible in the runtime"}

_INTEGER = re.compile(r"(?<![a-z0-9])(u?int(eger)?\d*|[iusq][1248]|[iu]16|w\d+a\d+|binary)(?![a-z0-9])", re.IGNORECASE)
_HALF = re.compile(r"(?<![a-z0-9])(bf16|bfloat16|f16|fp16|float16|half)(?![a-z0-9])", re.IGNORECASE)
_FLOAT = re.compile(r"(?<![a-z0-9])(t?f(loat|p)?(32|64)?|float|double|ternary)(?![a-z0-9])", re.IGNORECASE)


def family(name: str | None) -> str:
    """The family of a precision, in any runtime's spelling.

    >>> [family(n) for n in ("int8", "u8", "integer", "binary", "bf16", "fp32", None, "fused into conv1")]
    ['integer', 'integer', 'integer', 'integer', 'half', 'float', 'unseen', 'unseen']
    """
    for kind, pattern in ((INTEGER, _INTEGER), (HALF, _HALF), (FLOAT, _FLOAT)):
        if name is not None and pattern.search(name):
            return kind
    return UNSEEN


def counted(candidate: Candidate) -> tuple[int, int] | None:
    """Numbers of operators executed in integers and in floating point; None if unknown."""
    if not candidate.integer_operators and not candidate.float_operators:
        return None
    return sum(candidate.integer_operators.values()), sum(candidate.float_operators.values())


def in_floats(candidate: Candidate) -> str:
    """Share of an integer artifact that stays in floating point, as a line of text; "" below 0.5 %.

    Of one that computes nothing in integers, what it is good for.

    >>> from penjing.records import Measured
    >>> about = dict(runtime="openvino", precision="int8", folder="x", measured=Measured())
    >>> in_floats(Candidate(name="openvino-int8", float_macs_share=0.25, float_bytes_share=0.031, **about))
    'openvino-int8: 25% of the multiply-accumulates and 3% of the parameter bytes in floating point'
    """
    if candidate.only_stored:
        return "" if candidate.rejection else f"{candidate.name}: {STORED}"
    macs, size = candidate.float_macs_share, candidate.float_bytes_share
    parts = [(macs, "multiply-accumulates"), (size, "parameter bytes")]
    phrases = [f"{share:.0%} of the {what}" for share, what in parts if share is not None and share >= 0.005]
    return f"{candidate.name}: {' and '.join(phrases)} in floating point" if phrases else ""


def no_smaller(record: Record, candidate: Candidate) -> str:
    """A note that an integer artifact is not smaller than the half-precision one of its runtime; "" if it is smaller.

    In small networks, scales, zero points and additional operators take the space that integer weights save.
    """
    size = candidate.measured.size_bytes
    others = (c for c in record.candidates if c.runtime == candidate.runtime and family(c.precision) == HALF)
    half = min((c for c in others if c.measured.size_bytes), key=lambda c: c.measured.size_bytes or 0, default=None)
    if family(candidate.precision) != INTEGER or half is None or not size or size < (half.measured.size_bytes or 0):
        return ""
    sizes = " against ".join(numbers.figure(c.measured.size_bytes, "bytes") for c in (candidate, half))
    return (
        f"{candidate.name}: no smaller than {half.name} ({sizes}): scales and operators take up what its weights save, "
        "as in small networks"
    )
