"""How a flat row of documents is cut into chunks.

A batch is one flat row of T = B·S tokens. A document longer than a chunk is cut into chunks that share keys and values; shorter
ones are collected whole, so that a chunk lies inside one document or holds whole documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

ALIGNMENT = 128
"""Pieces of a long document have a multiple of this many tokens, as attention kernels tile them; only the last may differ."""


@dataclass(frozen=True)
class Chunk:
    """Query tokens handled at once."""

    index: int
    start: int
    """First token in the flat row."""
    stop: int
    offset: int
    """Tokens of the same document before `start`; of the row, where ranks share it."""
    documents: tuple[int, ...]
    """Lengths of the parts of documents in it; more than one only if each is a whole document."""
    longest: int
    """Tokens of the longest document that it holds or is a part of."""
    shares: bool
    """Whether it is a part of a longer document, whose keys and values later chunks attend to."""

    @property
    def length(self) -> int:
        """Tokens."""
        return self.stop - self.start


Group = tuple[Chunk, ...]
"""Chunks that share keys and values: those of one long document, or one chunk of whole documents."""


def cut(documents: Sequence[int], size: int) -> tuple[Group, ...]:
    """Chunks of at most `size` tokens over documents of these lengths, in order."""
    groups: list[Group] = []
    whole: list[int] = []
    position = index = 0

    def collect() -> None:
        nonlocal position, index
        if whole:
            stop = position + sum(whole)
            groups.append((Chunk(index, position, stop, 0, tuple(whole), max(whole), shares=False),))
            position, index = stop, index + 1
            whole.clear()

    for length in documents:
        if sum(whole) + length > size:
            collect()
        if length <= size:
            whole.append(length)
            continue
        pieces = _pieces(length, size)
        offsets = [sum(pieces[:i]) for i in range(len(pieces))]
        groups.append(
            tuple(
                Chunk(index + i, position + offset, position + offset + piece, offset, (piece,), length, shares=True)
                for i, (offset, piece) in enumerate(zip(offsets, pieces, strict=True))
            )
        )
        position, index = position + length, index + len(pieces)
    collect()
    return tuple(groups)


def slices(tokens: int, longest: int, size: int, position: Callable[[int], int]) -> tuple[Group, ...]:
    """Chunks of at most `size` of the tokens that one of several ranks holds: documents go across ranks, and so does attention.

    Args:
        longest: tokens of the longest document.
        position: where in its row one of the rank's tokens is.
    """
    pieces = _pieces(tokens, size)
    starts = [sum(pieces[:i]) for i in range(len(pieces))]
    return tuple(
        (Chunk(i, start, start + piece, position(start), (piece,), longest, shares=False),)
        for i, (start, piece) in enumerate(zip(starts, pieces, strict=True))
    )


def _pieces(length: int, size: int) -> list[int]:
    """`length` in as few parts of at most `size` as it takes, as even as alignment lets them be."""
    count = -(-length // size)
    even = -(-length // count)
    piece = min(size, -(-even // ALIGNMENT) * ALIGNMENT)
    return [min(piece, length - start) for start in range(0, length, piece)]


@cache
def longest_chunk(length: int, documents: int, size: int) -> tuple[int, int]:
    """Tokens of the longest chunk over so many documents of one length, and of a document before its last chunk."""
    if length <= size:
        return min(documents, size // length) * length, 0
    pieces = _pieces(length, size)
    return pieces[0], length - pieces[-1]
