"""Measurements as Markdown: a grid of cells, and the line that says where they come from."""

from collections.abc import Iterable, Sequence
from typing import Any

from elite.facts import GIB

NONE = "–"
"""A cell for which nothing was measured."""


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---" for _ in head], *rows])


def gibibytes(value: float | None) -> str:
    """Bytes in GiB, without the unit, which stands in the head."""
    return NONE if value is None else f"{value / GIB:.2f}"


def signed(value: float | None, form: str, unit: str = "") -> str:
    """A difference with its sign, in a number format such as `.2f`."""
    return NONE if value is None else f"{value:+{form}}{unit}"


def passed(sequences: int, tokens: int) -> str:
    """What a pass takes."""
    return f"{sequences} × {tokens:,}" if sequences > 1 else f"{tokens:,}"


def origin(environments: Sequence[dict[str, Any]], devices: Iterable[str] = ()) -> str:
    """Devices, versions and commits, each named once."""
    versions = [f"torch {e['versions']['torch']}, transformers {e['versions']['transformers']}" for e in environments]
    commits = [f"commit {e['commit']}" for e in environments]
    return "; ".join(filter(None, (" / ".join(dict.fromkeys(values)) for values in (devices, versions, commits))))


def missing(path: str) -> str:
    """What stands where a table will be."""
    return f"Not measured yet: no `docs/measurements/{path}`."
