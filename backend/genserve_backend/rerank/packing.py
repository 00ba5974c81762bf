"""Cutting sequences of different lengths into forwards that waste little on padding."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], *, max_num_seqs: int, max_num_batched_tokens: int) -> list[list[int]]:
    """Group sequences of similar length.

    Args:
        lengths: Tokens of each sequence.
        max_num_seqs: Sequences in one group, at most; at least 1.
        max_num_batched_tokens: Tokens in one group, at most, each sequence padded to the longest of its group. A
            sequence that exceeds this alone gets a group of its own.

    Returns:
        Groups of indices into `lengths`. Every index is in exactly one group; longer sequences come first, so a
        request that is too large for the device fails at its first forward and not at its last.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        group = groups[-1] if groups else []
        width = lengths[group[0]] if group else 0
        if group and len(group) < max_num_seqs and (len(group) + 1) * width <= max_num_batched_tokens:
            group.append(index)
        else:
            groups.append([index])
    return groups
