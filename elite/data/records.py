"""Records that hold texts: a JSON-lines file or a local `datasets` folder, read with nothing that could open the network.

A record's path and repository are names and never opened, whatever they spell.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from elite.config import DataConfig
from elite.data.documents import Document, Reading
from elite.data.filters import excluded, is_utf8
from elite.errors import DataError

MAX_LINE_BYTES = 256 << 20
"""A longer line is no record; it is skipped in pieces, for it may not fit into memory."""
SKIP_BYTES = 1 << 20
MAX_NAME = 4096
"""Characters of a record's path or repository: what file systems allow at most."""


def jsonl_documents(cfg: DataConfig) -> Reading:
    """Documents of a JSON-lines file, one object a line. Longer lines than `MAX_LINE_BYTES` are skipped and counted.

    Raises:
        DataError: no such file, or a line that is not UTF-8, not a JSON object or has no text; it names the line.
    """
    file = _local_path(cfg)
    if not file.is_file():
        raise DataError(f"data.path={cfg.path} is not a file", "data.path=FILE.jsonl names a file with one JSON object a line")
    skipped: Counter[str] = Counter()
    try:
        with file.open("rb") as content:
            return _records_reading(str(file), _objects(file, _lines(content, skipped), cfg), cfg, "line", skipped)
    except OSError as error:
        raise DataError(f"data.path={cfg.path} cannot be read: {error.strerror}", "check its permissions and its disk") from None


def _lines(content: BinaryIO, skipped: Counter[str]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank and not too long."""
    number = 0
    while line := content.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            skipped["too large"] += 1
            while (rest := content.readline(SKIP_BYTES)) and not rest.endswith(b"\n"):
                pass
        elif line.strip():
            yield number, line


def _objects(file: Path, lines: Iterable[tuple[int, bytes]], cfg: DataConfig) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in lines:
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            said = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise DataError(f"{file}, line {number}: not JSON ({said})", "correct or remove that line") from None
        if not isinstance(record, dict):
            raise DataError(f"{file}, line {number}: not a JSON object", f'write {{"{cfg.text_field}": "…"}}')
        yield number, record


def hf_documents(cfg: DataConfig) -> Reading:
    """Documents of a local `datasets` folder: one written by `save_to_disk`, or one that holds parquet, json, csv or text files.

    Of several splits `train` is taken, or the first where none has that name. Columns other than text, repository and path are not
    looked at: one of images or sounds would be opened wherever its records point.

    Raises:
        DataError: no such folder, `datasets` cannot load it, it names files elsewhere, or a record has no text.
    """
    import datasets  # here, because it takes a second to import and most runs read git

    folder = _local_path(cfg)
    if not folder.is_dir():
        problem = f"data.path={cfg.path} is not a folder; data sets are read from disk only"
        raise DataError(problem, "save_to_disk(FOLDER), then data.path=FOLDER")
    saved = any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
    notes: tuple[str, ...] = ()
    with _loadable(cfg):
        if not saved:
            _check_card(folder / "README.md", cfg)
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
        if isinstance(loaded, datasets.DatasetDict):
            split = "train" if "train" in loaded else next(iter(loaded))
            notes = (f"split {split} of {', '.join(loaded)}",)
            loaded = loaded[split]
        plain = [name for name, kind in loaded.features.items() if isinstance(kind, datasets.Value)]
        if cfg.text_field in plain:
            loaded = loaded.select_columns([name for name in (cfg.text_field, cfg.repo_field, cfg.path_field) if name in plain])
        elif len(loaded):
            raise _no_text(str(folder), "record", 1, loaded.column_names, cfg)
    return _records_reading(str(folder), _rows(loaded, cfg), cfg, "record", Counter(), notes)


def _rows(loaded: Any, cfg: DataConfig) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with _loadable(cfg):
        yield from enumerate(loaded, start=1)


@contextmanager
def _loadable(cfg: DataConfig) -> Iterator[None]:
    """What `datasets` raises, in words. Beside its own errors it lets those of its parsers through."""
    import datasets
    import pyarrow
    import yaml

    own: tuple[type[Exception], ...] = (datasets.exceptions.DatasetsError, pyarrow.lib.ArrowException, yaml.YAMLError)
    plain = (OSError, ImportError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, StopIteration)
    try:
        yield
    except own + plain as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data.path={cfg.path}: datasets cannot load it: {said}", "save it anew with save_to_disk(FOLDER)") from None


def _check_card(card: Path, cfg: DataConfig) -> None:
    """Refuse a data set whose card (the YAML on top of README.md) sends the library to files elsewhere, or to the network."""
    import yaml

    _, *front = (card.read_text(errors="replace") if card.is_file() else "").split("---\n", 2)
    found = yaml.safe_load(front[0]) if len(front) == 2 else None
    configs = found.get("configs") if isinstance(found, dict) else None
    for text in _texts(configs):
        if "://" in text or "::" in text or text.startswith(("/", "~")) or ".." in Path(text).parts:
            problem = f"data.path={cfg.path}: its README.md takes data from {text}, outside the folder"
            raise DataError(problem, "remove `configs` from the top of README.md, or name the files inside")


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | dict):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _texts(child)


def _no_text(origin: str, counted: str, number: int, fields: Iterable[str], cfg: DataConfig) -> DataError:
    problem = f"{origin}, {counted} {number}: no text in field {cfg.text_field} (fields: {', '.join(map(str, fields)) or 'none'})"
    return DataError(problem, "data.text_field=NAME names the field")


def _local_path(cfg: DataConfig) -> Path:
    """`data.path`, which must be set and exist."""
    if not cfg.path:
        raise DataError(f"data.path is unset, and data.source={cfg.source} reads from it", "data.path=PATH names a local file or folder")
    path = Path(cfg.path).expanduser()
    if not path.exists():
        raise DataError(f"data.path={cfg.path}: there is no such file or folder", "data.path=PATH names a local file or folder")
    return path


def _records_reading(
    origin: str,
    records: Iterable[tuple[int, Mapping[str, Any]]],
    cfg: DataConfig,
    counted: str,
    skipped: Counter[str],
    notes: tuple[str, ...] = (),
) -> Reading:
    """Numbered records → documents; adds the others to `skipped`."""
    documents: list[Document] = []
    for number, record in records:
        text = record.get(cfg.text_field)
        if not isinstance(text, str):
            raise _no_text(origin, counted, number, record, cfg)
        path, repo = (_name(record, field, f"{counted} {number}") for field in (cfg.path_field, cfg.repo_field))
        reason = _skip_reason(repo, path, text, cfg)
        if reason:
            skipped[reason] += 1
        else:
            documents.append(Document(repo, path, text))
    return Reading(origin, tuple(documents), dict(skipped), notes)


def _skip_reason(repo: str, path: str, text: str, cfg: DataConfig) -> str | None:
    """They are text already, so few of the filters apply."""
    rules = (
        (excluded(path, cfg.exclude), "excluded"),
        (not text.strip(), "empty"),
        (not is_utf8(repo + path + text), "not utf-8"),
        ("\0" in text, "binary"),
        (max(len(path), len(repo)) > MAX_NAME, "name too long"),
    )
    return next((reason for applies, reason in rules if applies), None)


def _name(record: Mapping[str, Any], field: str, otherwise: str) -> str:
    """A record's repository or path; where it has none, its number, so that it stands alone."""
    value = record.get(field)
    return otherwise if value is None or value == "" else str(value)
