"""Entities in sequences of tags, and how many of them are found whole.

Tjong Kim Sang and De Meulder, "Introduction to the CoNLL-2003 Shared Task", CoNLL 2003; as seqeval counts by default.
"""

from __future__ import annotations

from collections.abc import Sequence


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities of a sequence of BIO, BIOES or IO tags: (kind, first place, place after the last).

    An I- that continues nothing of its kind begins an entity, as conlleval has it.

    >>> sorted(entities(["B-LOC", "I-LOC", "O", "I-PER", "B-PER"]))
    [('LOC', 0, 2), ('PER', 3, 4), ('PER', 4, 5)]
    """
    spans: set[tuple[str, int, int]] = set()
    kind, start, before = "", 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, now = tag.partition("-")
        ends = bool(kind) and (prefix in "OBSU" or now != kind or before in ("E", "L", "S", "U"))
        if ends:
            spans.add((kind, start, place))
            kind = ""
        if prefix != "O" and not kind:
            kind, start = now, place
        before = prefix
    return spans


def entity_f1(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> float:
    """F1 over all entities, each right only with its kind and both its ends; 1 if there is none on either side.

    >>> entity_f1([["B-LOC", "O", "O"]], [["B-LOC", "O", "B-PER"]])
    0.6666666666666666
    """
    hits = count = 0
    for guess, right in zip(predicted, truth, strict=True):
        if len(guess) != len(right):
            raise ValueError(f"a sequence has {len(right)} tags, and {len(guess)} are predicted")
        found, true = entities(guess), entities(right)
        hits += len(found & true)
        count += len(found) + len(true)
    return 2 * hits / count if count else 1.0
