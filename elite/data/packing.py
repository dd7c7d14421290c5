"""Token spans → sequences of at most `context` tokens. Numbers only: no text, no tensors.

A *span* is a stretch of the token file, a *piece* the tokens of one document (it attends only within itself), a *sequence* the pieces
that one row of a batch holds. A document longer than the context is cut into pieces; nothing else is, which is the point of best-fit
packing (Ding et al. 2024, 'Fewer Truncations Improve Language Modeling'): it fills rows as well as cutting everything does.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from itertools import groupby

import numpy as np

from elite.config import FileOrder, Unit
from elite.data.tokens import TokenFile, TokenStore

Span = tuple[int, int]
"""(start, length) in the token file."""
Piece = tuple[Span, ...]
Sequence = tuple[Piece, ...]


def length(piece: Iterable[Span]) -> int:
    """Tokens in a piece."""
    return sum(tokens for _, tokens in piece)


def pieces(store: TokenStore, unit: Unit, order: FileOrder, context: int, rng: np.random.Generator) -> list[Piece]:
    """The training documents of `store`, each cut into pieces of at most `context` tokens.

    A document is a repository, its files one after the other (by path, or in an order drawn from `rng`), or a single file.
    Pieces of one token are left out: they have nothing to predict.
    """
    found: list[Piece] = []
    for document in _documents(store.select("train"), unit):
        if order is FileOrder.shuffled:
            document = [document[position] for position in rng.permutation(len(document))]
        found += cut([(file.start, file.length) for file in document], context)
    return [piece for piece in found if length(piece) > 1]


def cut(spans: Iterable[Span], limit: int) -> list[Piece]:
    """A stream of spans as pieces of exactly `limit` tokens, the last one of what is left."""
    found: list[Piece] = []
    current: list[Span] = []
    room = limit
    for start, tokens in spans:
        while tokens:
            taken = min(tokens, room)
            current.append((start, taken))
            start, tokens, room = start + taken, tokens - taken, room - taken
            if not room:
                found.append(tuple(current))
                current, room = [], limit
    return [*found, tuple(current)] if current else found


def pack(pieces: Iterable[Piece], context: int) -> list[Sequence]:
    """Best-fit decreasing: longest piece first, each into the fullest sequence that still has room for it.

    O(n log n) searches. The sorted list of distinct free lengths that they search never has more entries than `context`, nor than there
    are sequences, so keeping it sorted costs next to nothing.
    """
    rows: list[list[Piece]] = []
    free: list[int] = []
    rows_with: dict[int, list[int]] = {}
    for piece in sorted(pieces, key=length, reverse=True):
        needed = length(piece)
        position = bisect_left(free, needed)
        if position == len(free):
            row, room = len(rows), context
            rows.append([])
        else:
            room = free[position]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], free[position]
        rows[row].append(piece)
        room -= needed
        if room not in rows_with:
            rows_with[room] = []
            insort(free, room)
        rows_with[room].append(row)
    return [tuple(row) for row in rows]


def split(sequence: Sequence, context: int, parts: int) -> list[Sequence]:
    """A sequence of at most `context` tokens as `parts` rows of equal length; a piece across a border becomes two."""
    if parts == 1:
        return [sequence]
    size, filled = context // parts, 0
    rows: list[list[Piece]] = [[] for _ in range(parts)]
    for piece in sequence:
        first = cut(piece, size - filled % size)[0]
        for part in (first, *cut(_without(piece, length(first)), size)):
            rows[filled // size].append(part)
            filled += length(part)
    return [tuple(row) for row in rows]


def _without(piece: Piece, tokens: int) -> Piece:
    """The piece without so many tokens at its beginning."""
    kept: list[Span] = []
    for start, count in piece:
        if count > tokens:
            kept.append((start + tokens, count - tokens))
        tokens -= min(tokens, count)
    return tuple(kept)


def utilisation(sequences: Seq[Sequence], context: int) -> float:
    """Share of the `context` tokens of each sequence that are text, 0 to 1; the rest is padding."""
    return sum(length(piece) for sequence in sequences for piece in sequence) / (context * len(sequences)) if sequences else 0.0


def _documents(files: Seq[TokenFile], unit: Unit) -> list[list[TokenFile]]:
    """Files grouped into documents; `files` are by (repo, path)."""
    if unit is Unit.file:
        return [[file] for file in files]
    return [list(group) for _, group in groupby(files, key=lambda file: file.repo)]
