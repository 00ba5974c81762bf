"""Random rerank requests, and the comparison of rankings."""

from __future__ import annotations

import random
from collections.abc import Sequence

from genserve import RankedDocument

WORDS = (
    "Paris",
    "France",
    "capital",
    "Berlin",
    "river",
    "panda",
    "bamboo",
    "old",
    "new",
    "train",
    "station",
    "rain",
    "sun",
)
UNUSUAL = (
    "",
    "\u5df4\u9ece\u662f\u6cd5\u56fd\u7684\u9996\u90fd",
    "\U0001f43c\U0001f1eb\U0001f1f7",
    "e\u0301 \t \n",
    "no",
)

Request = tuple[str, list[str]]


def draw_request(rng: random.Random, *, documents: int, words: int) -> Request:
    """Return a query and up to `documents` + 2 distinct documents, of up to `words` words or unusual."""
    query = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, words))) for _ in range(rng.randint(1, documents))]
    return query, list(dict.fromkeys([*texts, *rng.sample(UNUSUAL, rng.randint(0, 2))]))


def same_ranking(one: Sequence[RankedDocument], other: Sequence[RankedDocument]) -> bool:
    """Return whether the order is the same and the scores differ by less than 1e-4."""
    return all(a.index == b.index and abs(a.score - b.score) < 1e-4 for a, b in zip(one, other, strict=True))
