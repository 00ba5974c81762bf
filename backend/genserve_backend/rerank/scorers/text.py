"""From texts to token ids: tokenization in slices, windows, and the special tokens around texts.

Texts are tokenized without special tokens and cut here; the special tokens are added afterwards. The result equals the
tokenizer's own for a text or pair whose last text is truncated, with three advantages:

- A query is tokenized once for all of its documents.
- The number of tokens that were cut is available.
- A document of a million characters takes no more memory than its tokens. (Tokenizers keep every cut piece of a pair
  together with a copy of the query.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from genserve_backend.checkpoints import CheckpointError
from genserve_backend.rerank.scorers.layouts import TokenSequence

# The limits of a slice: some tens of milliseconds of work.
_SLICE_TEXTS = 64
_SLICE_CHARACTERS = 200_000

OVERLAP = 8
"""Adjacent windows share one token in `OVERLAP`, so that a sentence at the edge of one is complete in the other."""


def token_ids(tokenizer: Any, texts: Iterable[str]) -> Iterator[tuple[int, list[list[int]], int]]:
    """Tokenize texts of any length without special tokens, slice by slice.

    Args:
        tokenizer: A fast tokenizer.
        texts: Consumed slice by slice.

    Yields:
        The index of the slice's first text, the ids of its texts, and their number of characters.
    """
    first = 0
    for group in _groups(texts):
        ids = tokenizer(
            group, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        yield first, ids, sum(map(len, group))
        first += len(group)


def one_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of one text."""
    ((_, (ids,), _),) = token_ids(tokenizer, [text])
    return ids


def ends_word(tokenizer: Any, text: str, following: str) -> bool:
    """Return whether a fast tokenizer's words, which no token spans, end between `text` and `following`."""
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is None:
        return False
    texts = (text + following, following)
    whole, after = (backend.normalizer.normalize_str(each) if backend.normalizer else each for each in texts)
    starts = (start for _, (start, _) in backend.pre_tokenizer.pre_tokenize_str(whole))
    return bool(whole.endswith(after)) and len(whole) - len(after) in starts


def windows(ids: list[int], room: int, *, at_most: int) -> list[tuple[list[int], bool]]:
    """Split a text that is too long into overlapping windows.

    Args:
        ids: The text's tokens.
        room: Tokens of a window, at most.
        at_most: Number of windows, at most.

    Returns:
        The windows, each with whether the text is cut after it, which can be true only for the last.
    """
    stride = max(room - room // OVERLAP, 1)
    count = 1 + max(0, -(-(len(ids) - room) // stride))
    starts = [index * stride for index in range(min(count, at_most))]
    return [(ids[start : start + room], start == starts[-1] and start + room < len(ids)) for start in starts]


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if len(group) >= _SLICE_TEXTS or characters >= _SLICE_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


@dataclass(frozen=True)
class Template:
    """The special tokens of a tokenizer around a single text or a pair."""

    gaps: tuple[tuple[int, ...], ...]
    """Token ids before the first text, between the texts, and after the last."""
    gap_types: tuple[tuple[int, ...], ...]
    """The segments of those."""
    text_types: tuple[int, ...]
    """The segment of each text's tokens."""
    filler: int
    """Replaces an empty text if there are no special tokens either."""

    @classmethod
    def of(cls, tokenizer: Any, *, texts: int, filler: int) -> Template:
        """Return the template of `tokenizer` for 1 or 2 `texts`.

        Raises:
            CheckpointError: The tokenizer drops even plain letters.
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
        """Return the sequence of `texts` with the special tokens around them."""
        ids = list(self.gaps[0])
        type_ids = list(self.gap_types[0])
        for text, kind, gap, gap_types in zip(texts, self.text_types, self.gaps[1:], self.gap_types[1:], strict=True):
            ids += chain(text, gap)
            type_ids += chain([kind] * len(text), gap_types)
        return TokenSequence(ids or [self.filler], type_ids or [0], document, truncated)

    def room(self, max_length: int, *, at_least: int) -> int:
        """Return the tokens left for the texts in a sequence of `max_length`.

        Raises:
            CheckpointError: Fewer than `at_least` are left.
        """
        left = max_length - self.length
        if left < at_least:
            raise CheckpointError(f"a limit of {max_length} tokens leaves no room between {self.length} special tokens")
        return left
