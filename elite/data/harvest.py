"""Documents → training files and held-out files: exact copies are dropped first, so that no held-out file has its twin in training."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

from elite.config import DataConfig
from elite.data.documents import Document, Reading
from elite.data.records import hf_documents, jsonl_documents
from elite.data.sources import repository_documents
from elite.errors import ConfigError, DataError
from elite.facts import Corpus

BYTES_PER_TOKEN = 3.2
"""Source code under the byte-level BPE vocabularies of current code models; only for estimates before anything is tokenised."""


@dataclass(frozen=True)
class Harvest:
    """The corpus as text. Both parts are ordered by (repo, path)."""

    origin: str
    train: tuple[Document, ...]
    val: tuple[Document, ...]
    skipped: dict[str, int]
    """Files left out, by reason; copies under 'duplicate'."""
    bytes: int
    """UTF-8 bytes of both parts."""
    notes: tuple[str, ...]
    """What the search for a source found, for the user."""


def harvest(cfg: DataConfig, seed: int, start: Path | None = None) -> Harvest:
    """Read `cfg`'s source, drop exact copies and hold out `cfg.val_fraction` of the files.

    Args:
        seed: which files are held out depends on it, and on nothing else but their names: not on the order of a listing.
        start: folder where the search for a repository begins if none is named; the working directory by default.

    Raises:
        ConfigError: `cfg.source` is unknown.
        DataError: the source is missing, unreadable or has fewer than two usable files.
    """
    reading = _read(cfg, start)
    skipped = dict(reading.skipped)
    documents = _without_copies(reading.documents)
    if len(documents) < len(reading.documents):
        skipped["duplicate"] = len(reading.documents) - len(documents)
    if len(documents) < 2:
        counted = ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items())) or "none"
        raise DataError(
            f"{reading.origin}: {len(documents)} usable file(s) (skipped: {counted}); training and validation need two",
            "add files, raise data.max_file_bytes, or choose another data.repo or data.path",
        )
    held_out = _held_out(documents, cfg.val_fraction, seed)
    return Harvest(
        origin=reading.origin,
        train=tuple(document for document in documents if document not in held_out),
        val=tuple(document for document in documents if document in held_out),
        skipped=dict(sorted(skipped.items())),
        bytes=_bytes(documents),
        notes=reading.notes,
    )


def estimate(harvest: Harvest, bytes_per_token: float = BYTES_PER_TOKEN) -> Corpus:
    """Token counts without a tokenizer, from UTF-8 bytes: good to some ten per cent, enough to choose a tier."""
    return Corpus(
        origin=harvest.origin,
        train_files=len(harvest.train),
        val_files=len(harvest.val),
        train_tokens=round(_bytes(harvest.train) / bytes_per_token),
        val_tokens=round(_bytes(harvest.val) / bytes_per_token),
        bytes=harvest.bytes,
        count_method="estimated from bytes",
        skipped=dict(harvest.skipped),
    )


def _read(cfg: DataConfig, start: Path | None) -> Reading:
    match cfg.source:
        case "repository":
            return repository_documents(cfg, start)
        case "jsonl":
            return jsonl_documents(cfg)
        case "hf":
            return hf_documents(cfg)
        case _:
            raise ConfigError(f"data.source={cfg.source} is unknown", "data.source is repository, hf or jsonl")


def _without_copies(documents: tuple[Document, ...]) -> list[Document]:
    """Documents by (repo, path, text), the first of those with equal text only."""
    first: dict[bytes, Document] = {}
    for document in sorted(documents, key=lambda document: (document.repo, document.path, document.text)):
        first.setdefault(hashlib.sha256(document.text.encode()).digest(), document)
    return list(first.values())


def _held_out(documents: list[Document], fraction: float, seed: int) -> set[Document]:
    """The files whose hash of (seed, repo, path) is smallest: at least one, and at least one stays for training."""

    def rank(document: Document) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}\0{document.repo}\0{document.path}".encode()).digest(), document.text

    # Rounded, because 0.07 · 100 is 7.000000000000001 in floating point, and its ceiling 8.
    count = math.ceil(round(fraction * len(documents), 6))
    return set(sorted(documents, key=rank)[: min(max(count, 1), len(documents) - 1)])


def _bytes(documents: tuple[Document, ...] | list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)
