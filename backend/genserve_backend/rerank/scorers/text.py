"""From texts to token ids: tokenising many texts with pauses, and a tokenizer's special tokens around them.

Texts are tokenised bare and cut here, and the special tokens are put around them afterwards. The result is what the
tokenizer makes of a text or pair with truncation of the last text; but a query is tokenised once for all of its
documents, the number of tokens that were cut is known, and a document of a million characters costs no more than its
tokens (tokenizers keep every cut piece of a pair together with a copy of the query).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.scorers.layouts import TokenSequence

# A slice: some tens of milliseconds of work.
_TEXTS_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 200_000

OVERLAP = 8
"""Windows share one token in so many with their neighbours, so that a sentence at an edge is whole in one of them."""


def token_ids(tokenizer: Any, texts: Iterable[str]) -> Iterator[tuple[int, list[list[int]], int]]:
    """The ids of each text, without special tokens around it and however long it is, a slice at a time.

    Args:
        tokenizer: A fast tokenizer.
        texts: Read as they are needed.

    Yields:
        The number of the slice's first text, the ids of its texts, and how many characters they have.
    """
    first = 0
    for group in _groups(texts):
        ids = tokenizer(
            group, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        yield first, ids, sum(map(len, group))
        first += len(group)


def one_text(tokenizer: Any, text: str) -> list[int]:
    """The ids of one text."""
    ((_, (ids,), _),) = token_ids(tokenizer, [text])
    return ids


def windows(ids: list[int], room: int, *, at_most: int) -> list[tuple[list[int], bool]]:
    """Cut a text that is too long.

    Args:
        ids: The text's tokens.
        room: Tokens of a part, at most.
        at_most: Parts.

    Returns:
        Parts that overlap by an eighth of `room`, and for each whether tokens were left out behind it, which only the
        last may say.
    """
    stride = max(room - room // OVERLAP, 1)
    count = 1 + max(0, -(-(len(ids) - room) // stride))
    starts = [number * stride for number in range(min(count, at_most))]
    return [(ids[start : start + room], start == starts[-1] and start + room < len(ids)) for start in starts]


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if len(group) >= _TEXTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    if group:
        yield group


@dataclass(frozen=True)
class Template:
    """The special tokens that a tokenizer puts around one text or around a pair."""

    gaps: tuple[tuple[int, ...], ...]
    """Token ids before the first text, between the texts, and after the last."""
    gap_types: tuple[tuple[int, ...], ...]
    """Their segments."""
    text_types: tuple[int, ...]
    """The segment of each text's tokens."""
    filler: int
    """Stands in for a text without any token where there are no special tokens either."""

    @classmethod
    def of(cls, tokenizer: Any, *, texts: int, filler: int) -> Template:
        """Ask `tokenizer` what it puts around `texts` (1 or 2) texts.

        Raises:
            CheckpointError: It drops even plain letters.
        """
        probe = tokenizer(*["a"] * texts, truncation=False, padding=False, return_token_type_ids=True)
        gaps: list[list[tuple[int, int]]] = [[] for _ in range(texts + 1)]
        text_types: dict[int, int] = {}
        for token, kind, owner in zip(probe["input_ids"], probe["token_type_ids"], probe.sequence_ids(0), strict=True):
            if owner is None:
                gaps[len(text_types)].append((token, kind))
            else:
                text_types[owner] = kind
        if len(text_types) != texts:
            raise CheckpointError(f"the tokenizer in {tokenizer.name_or_path} makes no token of a plain letter")
        return cls(
            gaps=tuple(tuple(token for token, _ in gap) for gap in gaps),
            gap_types=tuple(tuple(kind for _, kind in gap) for gap in gaps),
            text_types=tuple(text_types[owner] for owner in range(texts)),
            filler=filler,
        )

    @property
    def length(self) -> int:
        """Tokens of the template itself."""
        return sum(map(len, self.gaps))

    def around(self, *texts: list[int], document: int | None, truncated: bool) -> TokenSequence:
        """Put the special tokens around `texts`, as many as the template is for."""
        ids = list(self.gaps[0])
        type_ids = list(self.gap_types[0])
        for text, kind, gap, gap_types in zip(texts, self.text_types, self.gaps[1:], self.gap_types[1:], strict=True):
            ids += chain(text, gap)
            type_ids += chain([kind] * len(text), gap_types)
        return TokenSequence(ids or [self.filler], type_ids or [0], document, truncated)

    def room(self, max_length: int, *, at_least: int) -> int:
        """Tokens left for the texts in a sequence of `max_length`.

        Raises:
            CheckpointError: They are fewer than `at_least`.
        """
        left = max_length - self.length
        if left < at_least:
            raise CheckpointError(f"a limit of {max_length} tokens leaves no room between {self.length} special tokens")
        return left
