"""Find the rest of a post by its beginning: 200 posts of 20 Newsgroups among 600, by the cosine of embeddings.

The query is a post's first 30 words, the document the 50 after them. Calibration uses posts of the training part.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that this file also loads from another folder

import penjing as pj
from examples import data

LENGTH = 64
QUERIES, DOCUMENTS, CALIBRATION = 200, 600, 256
FIRST, REST = 30, 50  # words


def halves(texts: list[str], count: int) -> tuple[list[str], list[str]]:
    """The first 30 words, and the next 50, of the first `count` texts that are long enough."""
    long = [words for words in map(str.split, texts) if len(words) >= FIRST + REST][:count]
    return [" ".join(words[:FIRST]) for words in long], [" ".join(words[FIRST : FIRST + REST]) for words in long]


def task() -> pj.Task:
    """Create the task, whose metric is the mean reciprocal rank."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data.minilm())

    def tokens(texts: list[str]) -> dict[str, np.ndarray]:
        rows = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
        return {name: rows[name].astype(np.int64) for name in ("input_ids", "attention_mask")}

    posts = data.texts("20newsgroups")
    queries, documents = halves(posts["test"][0], DOCUMENTS)
    return pj.tasks.retrieval(
        tokens(queries[:QUERIES]),
        tokens(documents),
        np.arange(QUERIES),
        calibration=tokens(halves(posts["train"][0], CALIBRATION)[1]),
        metric="mrr",
        name="20newsgroups",
    )
