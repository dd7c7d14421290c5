"""What every source gives: documents, and what was left out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """One file (or record): the repository it belongs to, its '/'-separated path in it, and its text."""

    repo: str
    path: str
    text: str


@dataclass(frozen=True)
class Reading:
    """What a source gave: documents in no promised order, files left out by reason, and notes worth telling the user."""

    origin: str
    documents: tuple[Document, ...]
    skipped: dict[str, int]
    notes: tuple[str, ...] = ()
