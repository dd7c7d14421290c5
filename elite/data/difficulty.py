"""How difficult a sequence is: the mean over its tokens of what is known of the files that they are from."""

from bisect import bisect_right
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import groupby

from elite.config import Unit
from elite.data.packing import Sequence
from elite.data.tokens import TokenStore
from elite.errors import DataError


def document_lengths(store: TokenStore, unit: Unit) -> list[float]:
    """For each training file the tokens of the document that it belongs to: itself, or its repository."""
    files = store.select("train")
    if unit is Unit.file:
        return [float(file.length) for file in files]
    totals = {repo: float(sum(file.length for file in group)) for repo, group in groupby(files, key=lambda file: file.repo)}
    return [totals[file.repo] for file in files]


def by_files(store: TokenStore, values: Seq[float]) -> Callable[[Sequence], float]:
    """The difficulty of a sequence.

    Args:
        values: of each training file, in their order.

    Raises:
        DataError: all are alike, so there is nothing to order by.
    """
    if len(set(values)) < 2:
        problem = f"all training files are equally difficult ({values[0]:g}): there is no order from easy to hard"
        raise DataError(problem, "data.unit=file, curriculum.measure=loss or curriculum=none")
    starts = [file.start for file in store.select("train")]

    def difficulty(sequence: Sequence) -> float:
        total, tokens = 0.0, 0
        for start, count in (span for piece in sequence for span in piece):
            total += values[bisect_right(starts, start) - 1] * count
            tokens += count
        return total / tokens

    return difficulty
