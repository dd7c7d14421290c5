"""Held-out text as validation batches, with and without the rest of its repository before it; and a completion to look at.

A target is a stretch of held-out files. Both variants score exactly the same tokens: all of the target but its first, which the variant
without context could only guess blindly. What differs between the two losses is therefore what the repository told the model.
"""

import random
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath

import numpy as np

from elite.data.batches import IGNORE, Batch, collate
from elite.data.packing import Piece, Span, cut, length
from elite.data.tokens import TokenFile, TokenStore


@dataclass(frozen=True)
class Target:
    """A stretch of held-out tokens."""

    repo: str
    first_path: str
    """File that its first token is from."""
    piece: Piece


@dataclass(frozen=True)
class Completion:
    """A held-out file to be continued."""

    prompt: list[int]
    """Files of the repository, then the first part of the file."""
    reference: list[int]
    """What the file goes on with."""
    path: str


def targets(store: TokenStore, target_length: int, count: int, seed: int) -> list[Target]:
    """Up to `count` targets of at most `target_length` tokens, evenly spread over the held-out files; `seed` shifts the choice."""
    found = []
    for repo, group in groupby(store.select("val"), key=lambda file: file.repo):
        files = list(group)
        path_at = {file.start: file.path for file in files}
        for piece in cut([(file.start, file.length) for file in files], target_length):
            first = max(start for start in path_at if start <= piece[0][0])
            if length(piece) > 1:
                found.append(Target(repo, path_at[first], piece))
    if len(found) <= count:
        return found
    offset = random.Random(seed).random()
    return [found[int((step + offset) * len(found) / count)] for step in range(count)]


def validation_batches(store: TokenStore, context: int, target_length: int, count: int, seed: int, with_context: bool) -> list[Batch]:
    """One batch of one row a target, as long as its text: the context, if any, and the target, as one document.

    Args:
        context: tokens a row may have.
        target_length: tokens of a target, held to `context`.
        with_context: put as much of the target's repository before it as there is room for.
    """
    batches = []
    for target in targets(store, min(target_length, context), count, seed):
        scored = length(target.piece)
        before = context_spans(store, target.repo, target.first_path, context - scored) if with_context else []
        row = (*before, *target.piece)
        batch = collate(store, [(row,)], length(row), store.end_token)
        batch.labels[:, :-scored] = IGNORE
        batches.append(batch)
    return batches


def context_spans(store: TokenStore, repo: str, path: str, room: int) -> list[Span]:
    """Training files of `repo` that fill `room` tokens before a file at `path`: those nearest in the folder tree last.

    The earliest is cut at its start, so that the room is filled exactly unless the repository is exhausted.
    """
    files = [file for file in store.select("train") if file.repo == repo]
    spans: list[Span] = []
    for file in sorted(files, key=lambda file: (_distance(file.path, path), file.path)):
        if room <= 0:
            break
        taken = min(file.length, room)
        spans.append((file.start + file.length - taken, taken))
        room -= taken
    return spans[::-1]


def completion_example(store: TokenStore, context: int, tokens: int, seed: int) -> Completion | None:
    """A held-out file cut in its middle, at a line start where there is one: `tokens` tokens of reference after at most
    `context - tokens` of prompt. None if no held-out file has twice `tokens`, or `context` has no room."""
    files = _continued(store, context, tokens)
    return _cut(store, random.Random(seed).choice(files), context, tokens) if files else None


def completion_examples(store: TokenStore, context: int, tokens: int, count: int, seed: int) -> list[Completion]:
    """Up to `count` of them, each of another file."""
    files = _continued(store, context, tokens)
    return [_cut(store, file, context, tokens) for file in random.Random(seed).sample(files, min(count, len(files)))]


def _continued(store: TokenStore, context: int, tokens: int) -> list[TokenFile]:
    """Held-out files that are long enough: the longer half of them, which have more of themselves before the cut."""
    files = [file for file in store.select("val") if file.length > 2 * tokens]
    if context - tokens < 1:
        return []
    return sorted(files, key=lambda file: (file.length, file.path))[len(files) // 2 :]


def _cut(store: TokenStore, file: TokenFile, context: int, tokens: int) -> Completion:
    split, room = _middle(store, file, tokens), context - tokens
    first = min(split, room)
    spans = [*context_spans(store, file.repo, file.path, room - first), (file.start + split - first, first)]
    prompt = np.concatenate([store.tokens[start : start + count] for start, count in spans])
    reference = store.tokens[file.start + split : file.start + split + tokens]
    return Completion(prompt.tolist(), reference.tolist(), file.path)


def _middle(store: TokenStore, file: TokenFile, tokens: int) -> int:
    """Where to cut `file`, in tokens from its start: the line start nearest to its middle that leaves `tokens` before its end token."""
    content = store.tokens[file.start : file.start + file.length - 1 - tokens]
    starts = np.flatnonzero(np.isin(content, store.line_ends)) + 1
    middle = file.length // 2
    return int(starts[np.abs(starts - middle).argmin()]) if len(starts) else min(middle, len(content))


def _distance(one: str, other: str) -> int:
    """Steps between the folders of two files in the folder tree: 0 for the same folder."""
    folders, others = PurePosixPath(one).parent.parts, PurePosixPath(other).parent.parts
    shared = next((depth for depth, (a, b) in enumerate(zip(folders, others, strict=False)) if a != b), min(len(folders), len(others)))
    return len(folders) + len(others) - 2 * shared
