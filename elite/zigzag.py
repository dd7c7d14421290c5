"""How a row of tokens is dealt to ranks that share it: zigzag, so that causal attention is the same work for each.

A row is cut into 2R pieces, whose lengths differ by one token at most; rank r of R holds pieces r and 2R − 1 − r, one early and one late.

Source: Brandon et al. 2023, arXiv:2311.09431 (balance of causal ring attention); the zigzag order is that of Zhu's ring-flash-attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one document on one rank."""

    document: int
    """Its number in the row."""
    first: int
    """Token in the row."""
    offset: int
    """Token among those of the rank."""
    length: int

    @property
    def here(self) -> slice:
        """Its tokens among those of the rank."""
        return slice(self.offset, self.offset + self.length)


def held(length: int, rank: int, ranks: int) -> tuple[range, range]:
    """Tokens of a row of so many that a rank holds, in their order."""
    bounds = [length * piece // (2 * ranks) for piece in range(2 * ranks + 1)]
    early, late = rank, 2 * ranks - 1 - rank
    return range(bounds[early], bounds[early + 1]), range(bounds[late], bounds[late + 1])


def share(length: int, rank: int, ranks: int) -> int:
    """How many tokens those are; at most two more than another rank's."""
    return sum(len(piece) for piece in held(length, rank, ranks))


@lru_cache(maxsize=256)
def runs(documents: tuple[int, ...], rank: int, ranks: int) -> tuple[Run, ...]:
    """What a rank holds of a row, cut at the borders of its documents.

    Args:
        documents: their lengths; they sum to the row's.
    """
    found, offset = [], 0
    for piece in held(sum(documents), rank, ranks):
        start = 0
        for index, size in enumerate(documents):
            first, stop = max(start, piece.start), min(start + size, piece.stop)
            if first < stop:
                found.append(Run(index, first, offset, stop - first))
                offset += stop - first
            start += size
    return tuple(found)


def visible(queries: Sequence[Run], keys: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pairs of runs whose queries see keys: a run sees itself causally, which comes first, and whole those before it of its document."""
    return [(q, k) for q in queries for k in reversed(keys) if k.document == q.document and k.first <= q.first]
