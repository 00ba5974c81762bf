"""What other arithmetic costs the reranker: its rankings against those of float32, with the demo's real weights.

Questions about Python against the paragraphs of Python's own reference, which every Python has with it.
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
from rich.console import Console
from rich.table import Table

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.checkpoint import RerankCheckpoint
from genserve_backend.rerank.request import RerankRequest
from genserve_backend.rerank.scorers import load_scorer
from genserve_backend.settings import RerankSettings

CHECKPOINT = Path(__file__).parent.parent / "demo" / "rerank"
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
"""Sequences of a forward; no score depends on it."""


@dataclass(frozen=True)
class Agreement:
    """How near rankings are to those of float32."""

    correlation: float
    """Spearman's, the mean over the questions."""
    worst_correlation: float
    top: float
    """How many of a question's first ten are the same, the mean, as a share."""
    difference: float
    """The largest between two scores of a pair."""


def paragraphs() -> list[str]:
    """Of at least twelve words, in an order of their own."""
    found = {" ".join(text.split()) for topic in topics.values() for text in topic.split("\n\n")}
    return sorted(text for text in found if len(text.split()) >= 12)


def scores(dtype: str, documents: list[str]) -> NDArray[np.float32]:
    """Of each question, ``[questions, documents]``, by the demo's bi-encoder."""
    settings = RerankSettings(model_path=CHECKPOINT, dtype=dtype)
    scorer = load_scorer(RerankCheckpoint.read(CHECKPOINT), settings, "cpu")

    def rows(question: str, texts: Sequence[str]) -> list[torch.Tensor]:
        slices = scorer.read(RerankRequest(question, tuple(texts), None))
        sequences = [sequence for part in slices for sequence in part.sequences]
        batches = [sequences[start : start + FORWARD] for start in range(0, len(sequences), FORWARD)]
        return [row for batch in batches for row in scorer.forward(batch)]

    _, *embedded = rows(QUESTIONS[0], documents)  # the first row is the question's
    questions = [rows(question, documents[:1])[0] for question in QUESTIONS]
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


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--dtype", "dtypes", multiple=True, default=("bfloat16", "int8"), show_default=True)
def main(dtypes: tuple[str, ...]) -> None:
    """Compare rankings in other arithmetic with those of float32."""
    documents = paragraphs()
    drawn = Table()
    drawn.add_column("")
    for heading in ("Rank correlation", "Worst", f"Same first {TOP}", "Largest difference"):
        drawn.add_column(heading, justify="right")
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
        click.echo(f"rerank_quality: {error}", err=True)
        sys.exit(1)
    console = Console()
    console.print(f"{len(QUESTIONS)} questions against {len(documents):,} paragraphs, the weights of all-MiniLM-L6-v2")
    console.print(drawn)


if __name__ == "__main__":
    main()
