"""How a row of tokens is dealt to ranks that share it: zigzag, so that causal attention is the same work for each.

A row is cut into 2R pieces, whose lengths differ by one token at most; rank r of R holds pieces r and 2R − 1 − r, one early and one late.

Source: Brandon et al. 2023, arXiv:2311.09431 (balance of causal ring attention); the zigzag order is that of Zhu's ring-flash-attention.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Dealing:
    """Rows of equal length that ranks share, and the laps in which their keys come round, a part in each."""

    documents: tuple[tuple[int, ...], ...]
    """Of each row."""
    ranks: int
    laps: int

    def tokens(self, rank: int) -> int:
        """What a rank holds of all rows."""
        return len(self.documents) * share(sum(self.documents[0]), rank, self.ranks)

    def position(self, rank: int, token: int) -> int:
        """Where in its row one of a rank's tokens is."""
        early, late = held(sum(self.documents[0]), rank, self.ranks)
        return (*early, *late)[token % (len(early) + len(late))]

    def parts(self, rank: int, lap: int) -> list[slice]:
        """Which of a rank's tokens, one row's after another's, come round in a lap.

        A part of every piece, early and late: so each lap is the same work for all ranks, and so is each of its steps.
        """
        found, offset = [], 0
        for _ in self.documents:
            for piece in held(sum(self.documents[0]), rank, self.ranks):
                found.append(slice(offset + len(piece) * lap // self.laps, offset + len(piece) * (lap + 1) // self.laps))
                offset += len(piece)
        return found

    def sizes(self, lap: int) -> list[int]:
        """Tokens of each rank's block in a lap."""
        return [sum(part.stop - part.start for part in self.parts(rank, lap)) for rank in range(self.ranks)]


@dataclass(frozen=True)
class Seen:
    """Keys that queries see: all of them, or, where these come last among them, each those up to itself."""

    queries: slice
    """Within a chunk."""
    keys: slice
    """Within a block."""
    causal: bool


@lru_cache(maxsize=4096)
def seen(dealing: Dealing, rank: int, start: int, stop: int, owner: int, lap: int) -> tuple[Seen, ...]:
    """What a rank's tokens `start` … `stop` − 1, one row's after another's, see of the block that comes from `owner` in a lap."""
    queries, keys, at = _within(_all_runs(dealing, rank), start, stop), list[Run](), 0
    for part in dealing.parts(owner, lap):
        keys += [replace(run, offset=at + run.offset) for run in _within(_all_runs(dealing, owner), part.start, part.stop)]
        at += part.stop - part.start
    return tuple(found for q in queries for k in keys if k.document == q.document for found in _seen(q, k))


def _seen(q: Run, k: Run) -> Iterator[Seen]:
    """Of two runs of one document."""
    begin, end = max(q.first, k.first), min(q.first + q.length, k.first + k.length)
    if begin < end:
        queries = slice(q.offset + begin - q.first, q.offset + end - q.first)
        yield Seen(queries, slice(k.offset, k.offset + end - k.first), causal=True)
    after = max(q.first, k.first + k.length)
    if after < q.first + q.length:
        yield Seen(slice(q.offset + after - q.first, q.offset + q.length), k.here, causal=False)


@lru_cache(maxsize=64)
def _all_runs(dealing: Dealing, rank: int) -> tuple[Run, ...]:
    """Runs of all rows, documents numbered through."""
    found, before = list[Run](), 0
    for row, documents in enumerate(dealing.documents):
        at = row * share(sum(documents), rank, dealing.ranks)
        found += [replace(run, document=before + run.document, offset=at + run.offset) for run in runs(documents, rank, dealing.ranks)]
        before += len(documents)
    return tuple(found)


def _within(of: Sequence[Run], start: int, stop: int) -> list[Run]:
    """Those of a rank's tokens `start` … `stop` − 1, which count from 0."""
    found = []
    for run in of:
        first, last = max(run.offset, start), min(run.offset + run.length, stop)
        if first < last:
            found.append(Run(run.document, run.first + first - run.offset, first - start, last - first))
    return found
