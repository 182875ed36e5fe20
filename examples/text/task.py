"""News of Reuters by subject: 5,485 texts to train on and 2,189 to test, eight classes (R8, Lewis 1997)."""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

import penjing as pj
from examples import data
from examples.text.network import LENGTH, WORDS

HELD_OUT = 485  # train texts that choose among candidates
START, UNKNOWN = 1, 2  # 0 is padding


def words(text: str) -> list[str]:
    """Split into lowercase words."""
    return re.findall(r"[a-z]+", text.lower())


def numbers(texts: list[str], vocabulary: dict[str, int]) -> np.ndarray:
    """Number the words: (N, 96) int64, a start mark in front, 0 behind the end."""
    rows = np.zeros((len(texts), LENGTH), np.int64)
    for row, text in zip(rows, texts, strict=True):
        known = [START, *(vocabulary.get(word, UNKNOWN) for word in words(text))][:LENGTH]
        row[: len(known)] = known
    return rows


def task() -> pj.Task:
    """Create the task, whose metric is accuracy."""
    (texts, subjects), (test_texts, test_subjects) = (data.texts("reuters-r8")[part] for part in ("train", "test"))
    counts = Counter(word for text in texts for word in words(text))
    common = sorted(counts, key=lambda word: (-counts[word], word))[: WORDS - 3]
    vocabulary = {word: number for number, word in enumerate(common, start=3)}
    classes = {subject: number for number, subject in enumerate(sorted(set(subjects)))}
    x, y = numbers(texts, vocabulary), np.array([classes[subject] for subject in subjects])
    order = np.random.default_rng(0).permutation(len(x))
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    return pj.tasks.classification(
        (numbers(test_texts, vocabulary), np.array([classes[subject] for subject in test_subjects])),
        train=(x[rest], y[rest]),
        select=(x[held], y[held]),
        batch=64,
        name="reuters-r8",
    )
