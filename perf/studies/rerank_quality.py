"""Quality of bfloat16 and int8: the reranker's rankings against those of float32, with the demo's real weights.

Questions about Python against the paragraphs of Python's own reference, which comes with every Python.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import click
import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.command import RERANK_CHECKPOINT, SETTINGS, fail, new_table, show
from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers import build_scorer
from genserve_backend.settings import RerankDType, RerankSettings

QUESTIONS = (
    "How do I catch several kinds of exceptions?",
    "What happens when an integer is divided by zero?",
    "How does a class inherit from two others?",
    "What is the difference between a list and a tuple?",
    "How do I close a file even if something fails?",
    "Which operators bind more tightly than a comparison?",
    "What does the star in a function's parameters mean?",
    "How are names looked up in nested functions?",
    "When is an object's destructor called?",
    "How do I make my own object usable in a for loop?",
    "How do I format a number with two digits after the point?",
    "What is a coroutine and how is it awaited?",
    "How does Python find the module that I import?",
    "What can be the key of a dictionary?",
    "How do I control attribute access of a class?",
    "What does the walrus do?",
    "How do I write a string that spans several lines?",
    "How does pattern matching compare values?",
    "How can I stop the debugger at a line?",
    "Which values count as false?",
)
TOP = 10
FORWARD = 64
"""Sequences per forward; no score depends on it."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of rankings with those of float32."""

    correlation: float
    """Spearman's rank correlation, mean of the questions."""
    worst_correlation: float
    top: float
    """Share of a question's top ten that is the same, mean of the questions."""
    difference: float
    """Largest difference between two scores of a pair."""


def paragraphs() -> list[str]:
    """Return all paragraphs of at least twelve words, sorted."""
    found = {" ".join(text.split()) for topic in topics.values() for text in topic.split("\n\n")}
    return sorted(text for text in found if len(text.split()) >= 12)


def scores(dtype: RerankDType, documents: list[str]) -> NDArray[np.float32]:
    """Return the scores ``[questions, documents]`` of the demo's bi-encoder."""
    settings = RerankSettings(model_path=RERANK_CHECKPOINT, dtype=dtype)
    scorer = build_scorer(RerankCheckpoint.load(RERANK_CHECKPOINT), settings, "cpu")

    def outputs(question: str, texts: Sequence[str]) -> list[torch.Tensor]:
        slices = scorer.tokenize(RerankRequest(question, tuple(texts), None))
        sequences = [sequence for part in slices for sequence in part.sequences]
        batches = [sequences[start : start + FORWARD] for start in range(0, len(sequences), FORWARD)]
        return [output for batch in batches for output in scorer.forward(batch)]

    _, *embedded = outputs(QUESTIONS[0], documents)  # the first one is the question's
    questions = [outputs(question, documents[:1])[0] for question in QUESTIONS]
    return np.stack([scorer.scores(torch.stack([question, *embedded])).numpy() for question in questions])


def agreement(exact: NDArray[np.float32], other: NDArray[np.float32]) -> Agreement:
    """Compare scores ``[questions, documents]`` with those of float32."""
    correlations = [
        float(np.corrcoef(_ranks(mine), _ranks(theirs))[0, 1]) for mine, theirs in zip(exact, other, strict=True)
    ]
    same = [
        len({*np.argsort(-mine)[:TOP]} & {*np.argsort(-theirs)[:TOP]}) / TOP
        for mine, theirs in zip(exact, other, strict=True)
    ]
    return Agreement(
        float(np.mean(correlations)), min(correlations), float(np.mean(same)), float(np.abs(exact - other).max())
    )


def _ranks(values: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.argsort(np.argsort(values))


@click.command(context_settings=SETTINGS)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(["bfloat16", "float16", "int8"]),
    multiple=True,
    default=("bfloat16", "int8"),
    show_default=True,
)
def main(dtypes: tuple[RerankDType, ...]) -> None:
    """Compare rankings in other dtypes with those of float32."""
    documents = paragraphs()
    drawn = new_table("", "Rank correlation", "Worst", f"Same top {TOP}", "Largest difference")
    try:
        exact = scores("float32", documents)
        for dtype in dtypes:
            found = agreement(exact, scores(dtype, documents))
            drawn.add_row(
                dtype,
                f"{found.correlation:.4f}",
                f"{found.worst_correlation:.4f}",
                f"{found.top:.1%}",
                f"{found.difference:.4f}",
            )
    except CheckpointError as error:
        fail(error)
    show(drawn, f"{len(QUESTIONS)} questions against {len(documents):,} paragraphs, the weights of all-MiniLM-L6-v2")


if __name__ == "__main__":
    main()
