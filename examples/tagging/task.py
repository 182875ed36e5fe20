"""Who, where, when and how much: entities in sentences by construction, tagged character by character.

Sentences come from patterns; names and places are put together of syllables at random, so that the test holds names
that no training sentence has. The syllables of the test's names are partly new, too.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

import penjing as pj
from examples.tagging.network import LENGTH

KINDS = ("PER", "LOC", "DATE", "NUM")
TAGS = ("O", *(f"{prefix}-{kind}" for kind in KINDS for prefix in "BI"))
ALPHABET = "\0 abcdefghijklmnopqrstuvwxyz0123456789.,:'-%"  # written in lowercase: capitals would tell
PATTERNS = (
    "{PER} moved from {LOC} to {LOC} on {DATE}",
    "send {NUM} boxes to {PER} in {LOC} before {DATE}",
    "{PER} and {PER} met in {LOC}",
    "on {DATE} the price rose to {NUM} in {LOC}",
    "please call {PER} at {NUM}, or write to {LOC}",
    "the train from {LOC} leaves at {NUM} on {DATE}",
    "{NUM} people came, said {PER}",
    "there is nothing to report from {LOC} today",
    "may we march with {PER} on {DATE}",
    "the second of the two letters is for {PER}",
)
SYLLABLES = (
    "al ber ca den el fa gor hin is jo ka lu mar ne or pe qui ra so ta ul va wen xi yor zu bra cle stro thy".split()
)
ENDINGS = {"PER": ("a", "o", "ez", "son", "ski", "ini"), "LOC": ("burg", "ville", "ton", "grad", "stadt", "ia")}
MONTHS = "january february march april may june july august september october november december".split()
SCALES = ("", "", "", " hundred", " thousand", " million", "%")


def sentences(count: int, seed: int, syllables: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sentences (count, 96) as character numbers, and the tag of every character, -100 behind the end."""
    random = np.random.default_rng(seed)
    characters = np.zeros((count, LENGTH), np.int64)
    tags = np.full((count, LENGTH), -100, np.int64)
    for row in range(count):
        text, marks = "", []
        for piece in PATTERNS[int(random.integers(len(PATTERNS)))].replace("}", "{").split("{"):
            words = _entity(piece, random, syllables) if piece in KINDS else piece
            begin = TAGS.index(f"B-{piece}") if piece in KINDS else 0
            marks += [begin + (begin > 0 and place > 0) for place in range(len(words))]
            text += words
        length = min(len(text), LENGTH)
        characters[row, :length] = [ALPHABET.index(character) for character in text[:length]]
        tags[row, :length] = marks[:length]
    return characters, tags


def _entity(kind: str, random: np.random.Generator, syllables: list[str]) -> str:
    def name(ending: str, most: int) -> str:
        return "".join(random.choice(syllables, int(random.integers(1, most + 1)))) + str(
            random.choice(ENDINGS[ending])
        )

    if kind == "NUM":
        return f"{int(10 ** random.uniform(0, 4))}{random.choice(SCALES)}"
    if kind == "DATE":
        day, month = int(random.integers(1, 29)), str(random.choice(MONTHS))
        forms = (
            f"{day} {month}",
            f"{month} {day}",
            f"{day}.{MONTHS.index(month) + 1}.{random.integers(1950, 2030)}",
            month,
        )
        return forms[int(random.integers(len(forms)))]
    if kind == "LOC":
        return name("LOC", 2)
    return " ".join(name("PER", 3) for _ in range(int(random.integers(1, 3))))


def task() -> pj.Task:
    """Create the task, whose metric is F1 over whole entities."""
    known = SYLLABLES[:22]
    x, y = sentences(8000, 0, known)
    return pj.tasks.tagging(
        sentences(1500, 1, SYLLABLES),
        tags=TAGS,
        select=sentences(600, 2, SYLLABLES),
        train=(x, y),
        calibration=x[:256],
        batch=64,
        name="constructed-entities",
    )
