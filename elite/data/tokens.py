"""Text → tokens, once: a memory-mapped file of all tokens with an index of files, in a folder named by a hash of all that went in.

A document is `# path`, a line break, its text and an end-of-text token. Text never becomes a control token: a source file that spells
`<|endoftext|>` or `<|fim_prefix|>` is tokenised as those characters. The tokenizer's own threads are the parallelism.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from elite.data.documents import Document
from elite.data.harvest import Harvest
from elite.errors import DataError, ModelError
from elite.facts import Corpus

logger = logging.getLogger("elite.data")

LAYOUT = 1
"""Version of what is stored and how; part of the key, so another layout is another folder."""
END_OF_TEXT = "<|endoftext|>"
TOKENS, INDEX, MANIFEST = "tokens.bin", "index.json", "manifest.json"
BATCH_BYTES = 4 << 20
"""Text handed to the tokenizer at once: enough for its threads, little enough for a lively progress bar."""


@dataclass(frozen=True)
class TokenFile:
    """Where one document's tokens stand: `tokens[start : start + length]`, its end-of-text token last."""

    repo: str
    path: str
    start: int
    length: int
    split: str
    """`train` or `val`."""


@dataclass(frozen=True, eq=False)
class TokenStore:
    """A tokenised corpus."""

    folder: Path
    """Where it lies on disk."""
    tokens: NDArray[np.unsignedinteger[Any]]
    """All tokens, [N]: uint16, or uint32 for vocabularies of 65,536 and more; mapped from disk, or in memory."""
    files: tuple[TokenFile, ...]
    """Training files, then held-out files, each by (repo, path)."""
    end_token: int
    """Id of the end-of-text token that closes a document, and pads."""
    line_ends: tuple[int, ...]
    """Ids of tokens after which a line starts: a line break, with or without the indentation that follows it."""

    def resident(self) -> "TokenStore":
        """The same corpus with all its tokens in memory."""
        return replace(self, tokens=np.fromfile(self.folder / TOKENS, dtype=self.tokens.dtype))

    def select(self, split: str) -> tuple[TokenFile, ...]:
        """Files of one split (`train` or `val`), by (repo, path)."""
        return tuple(file for file in self.files if file.split == split)

    def count(self, split: str) -> int:
        """Tokens of one split."""
        return sum(file.length for file in self.select(split))

    def corpus(self, harvest: Harvest) -> Corpus:
        """The corpus with exact token counts."""
        return Corpus(
            origin=harvest.origin,
            train_files=len(harvest.train),
            val_files=len(harvest.val),
            train_tokens=self.count("train"),
            val_tokens=self.count("val"),
            bytes=harvest.bytes,
            count_method="exact",
            skipped=dict(harvest.skipped),
        )


def tokenise(harvest: Harvest, tokenizer: PreTrainedTokenizerBase, cache: Path, progress: bool = True) -> TokenStore:
    """The tokens of `harvest`: from `cache` if they are there and whole, otherwise tokenised and stored there.

    Args:
        cache: parent of all tokenised corpora.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        DataError: the cache cannot be written.
        ModelError: the tokenizer is not a fast one, or has no end-of-text token.
    """
    folder = _folder(harvest, tokenizer, cache)
    store = open_store(folder)
    if store is not None:
        return store
    if folder.exists():
        logger.warning("token cache %s is corrupt; building it anew", folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        try:
            _build(temporary, harvest, tokenizer, progress)
            _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        problem = f"the token cache {folder} cannot be written: {error.strerror}"
        raise DataError(problem, "free space there, or output.cache=PATH") from error
    store = open_store(folder)
    if store is None:
        raise DataError(f"the token cache {folder} does not read back as written", "output.cache=PATH on another disk")
    return store


def cached(harvest: Harvest, tokenizer: PreTrainedTokenizerBase, cache: Path) -> TokenStore | None:
    """The tokens of `harvest` if they are in `cache` and whole; never tokenises."""
    return open_store(_folder(harvest, tokenizer, cache))


def plain_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer that reads control tokens in text as the characters they are.

    `encode_special_tokens` does this for tokens marked special. Some vocabularies leave theirs unmarked (Qwen2.5's `<|fim_prefix|>`), so
    every added token is marked, save those of white space alone: they are ordinary vocabulary (Phi-2's runs of blanks).

    Raises:
        ModelError: it is not a fast tokenizer.
    """
    plain = Tokenizer.from_str(_plain_state(tokenizer))
    plain.encode_special_tokens = True
    return plain


def _plain_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """The backend as JSON, added tokens other than white space marked special, without what earlier calls set (padding, truncation)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(f"{type(tokenizer).__name__} is not a fast tokenizer", "choose a model with a tokenizer.json")
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = bool(token["content"].strip())
    return json.dumps(state | {"truncation": None, "padding": None})


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """`<|endoftext|>` where the vocabulary has it: chat models name another token their end of text, but were pretrained on this one."""
    vocabulary = tokenizer.get_vocab()
    if END_OF_TEXT in vocabulary:
        return vocabulary[END_OF_TEXT]
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-text token to separate documents", "choose a model whose tokenizer has eos_token")
    return int(tokenizer.eos_token_id)


def _line_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end in a line break and blanks. Byte-level vocabularies spell \\n as Ċ, blank as Ġ and tab as ĉ; byte fallback <0x0A>."""
    vocabulary = tokenizer.get_vocab()
    return tuple(sorted(token for text, token in vocabulary.items() if text.rstrip("Ġĉ \t▁").endswith(("Ċ", "\n", "<0x0A>"))))


def _documents(harvest: Harvest) -> Iterator[tuple[str, Document]]:
    for split, documents in (("train", harvest.train), ("val", harvest.val)):
        for document in documents:
            yield split, document


def _folder(harvest: Harvest, tokenizer: PreTrainedTokenizerBase, cache: Path) -> Path:
    """The cache folder, named by a hash of the layout, the tokenizer, and every file's repository, path, split and text."""
    key = hashlib.sha256(json.dumps([LAYOUT, _end_token(tokenizer), len(tokenizer)]).encode())
    key.update(_plain_state(tokenizer).encode())
    for split, document in _documents(harvest):
        content = hashlib.sha256(document.text.encode()).hexdigest()
        key.update(json.dumps([document.repo, document.path, split, content]).encode())
    return cache.expanduser() / "tokens" / key.hexdigest()[:32]


def open_store(folder: Path) -> TokenStore | None:
    """The tokenised corpus in `folder`; None if it is not there, or is not what its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if any(manifest[name] != _fingerprint(folder / name) for name in (TOKENS, INDEX)):
            return None
        index = json.loads((folder / INDEX).read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TokenStore(
        folder=folder,
        tokens=np.memmap(folder / TOKENS, dtype=index["dtype"], mode="r"),
        files=tuple(TokenFile(**file) for file in index["files"]),
        end_token=index["end_token"],
        line_ends=tuple(index["line_ends"]),
    )


def _fingerprint(file: Path) -> dict[str, int | str]:
    """Size in bytes and SHA-256 of a file."""
    with file.open("rb") as content:
        return {"bytes": os.fstat(content.fileno()).st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _build(folder: Path, harvest: Harvest, tokenizer: PreTrainedTokenizerBase, progress: bool) -> None:
    """Tokenise into `folder`: the tokens, the index, and last the manifest that vouches for both."""
    dtype = "uint16" if len(tokenizer) < 1 << 16 else "uint32"
    with (folder / TOKENS).open("wb") as tokens:
        files = _write_tokens(tokens, harvest, tokenizer, dtype, progress)
    index = {
        "dtype": dtype,
        "end_token": _end_token(tokenizer),
        "line_ends": _line_ends(tokenizer),
        "files": [asdict(file) for file in files],
    }
    (folder / INDEX).write_text(json.dumps(index))
    (folder / MANIFEST).write_text(json.dumps({name: _fingerprint(folder / name) for name in (TOKENS, INDEX)}))


def _write_tokens(tokens: BinaryIO, harvest: Harvest, tokenizer: PreTrainedTokenizerBase, dtype: str, progress: bool) -> list[TokenFile]:
    plain, end = plain_tokenizer(tokenizer), _end_token(tokenizer)
    files: list[TokenFile] = []
    start = 0
    with _bar(progress) as bar:
        task = bar.add_task("tokenising", total=harvest.bytes)
        for batch in _batches(harvest):
            texts = [f"# {document.path}\n{document.text}" for _, document in batch]
            for (split, document), encoding in zip(batch, plain.encode_batch_fast(texts, add_special_tokens=False), strict=True):
                ids = np.array([*encoding.ids, end], dtype=dtype)
                tokens.write(ids.tobytes())
                files.append(TokenFile(document.repo, document.path, start, len(ids), split))
                start += len(ids)
            bar.advance(task, sum(len(document.text.encode()) for _, document in batch))
    return files


def _batches(harvest: Harvest) -> Iterator[list[tuple[str, Document]]]:
    """All documents in order, in lists of about `BATCH_BYTES` characters."""
    batch: list[tuple[str, Document]] = []
    size = 0
    for split, document in _documents(harvest):
        batch.append((split, document))
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bar(progress: bool) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True), disable=not (progress and sys.stderr.isatty()), transient=True)


def _publish(temporary: Path, folder: Path) -> None:
    """Rename into place, over a corrupt folder. Whole tokens that another process has put there meanwhile stay."""
    if open_store(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:
        if open_store(folder) is None:
            raise
