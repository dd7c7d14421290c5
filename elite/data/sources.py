"""Where documents come from: git repositories, a JSON-lines file or a local `datasets` folder. Nothing here opens the network.

Only files that git tracks are read, so `.gitignore` holds by itself; their text is that of the working tree. Each reader returns a
`Reading`: documents that passed the filters, and how many were left out, by reason.
"""

import json
import os
import stat
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elite.config import DataConfig
from elite.data.filters import content_skip_reason, excluded, is_utf8, path_skip_reason
from elite.errors import DataError

SYMLINK, SUBMODULE = "120000", "160000"
PROJECTS = Path("~/projects")
PICK = "data.repo=PATH names a git repository, or a folder whose direct children are git repositories"


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


def enclosing_repository(folder: Path) -> Path | None:
    """The top level of the git repository that `folder` lies in, or None. A worktree's or submodule's `.git` is a file."""
    return next((parent for parent in (folder, *folder.parents) if (parent / ".git").exists()), None)


def child_repositories(folder: Path) -> list[Path]:
    """Direct children of `folder` that are git repositories, by name; none where the folder is missing or unreadable."""
    try:
        return sorted(child for child in folder.iterdir() if (child / ".git").exists())
    except OSError:
        return []


def find_repositories(start: Path) -> list[Path]:
    """Repositories to take when none is named: the one around `start`, else those directly in it, in its parent, in ~/projects.

    The first of these places that has any decides; its repositories are returned by name.
    """
    start = start.resolve()
    enclosing = enclosing_repository(start)
    if enclosing:
        return [enclosing]
    places = (start, start.parent, PROJECTS.expanduser())
    return next((found for found in map(child_repositories, places) if found), [])


def repository_documents(cfg: DataConfig, start: Path | None = None) -> Reading:
    """Documents of the repository or repositories that `cfg.repo` names; unset: of the first that `find_repositories(start)` finds.

    Raises:
        DataError: the folder is missing, is not git, or git tracks nothing there.
    """
    roots, notes = _roots(cfg, start or Path.cwd())
    skipped: Counter[str] = Counter()
    documents: list[Document] = []
    for root in roots:
        documents += _read_repository(root, cfg, skipped)
    origin = str(roots[0] if len(roots) == 1 else roots[0].parent)
    if not documents and not skipped:
        raise DataError(f"{origin}: git tracks no files there, so there is nothing to train on", "git add your files, or " + PICK)
    return Reading(origin, tuple(documents), dict(skipped), notes)


def _roots(cfg: DataConfig, start: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Top levels of the repositories to read, and what to tell the user about the choice."""
    if cfg.repo is None:
        found = find_repositories(start)
        if not found:
            raise DataError(f"no git repository in {start.resolve()}, its parent or {PROJECTS}", PICK)
        if len(found) == 1:
            return found, (f"repository found: {found[0]}; data.repo=PATH picks another",)
        names = ", ".join(path.name for path in found)
        return found[:1], (f"several repositories found: {names}; taking {found[0]}; data.repo=PATH picks another",)
    folder = Path(cfg.repo).expanduser().resolve()
    if not folder.is_dir():
        raise DataError(f"data.repo={cfg.repo}: there is no such folder", PICK)
    enclosing = enclosing_repository(folder)
    roots = [enclosing] if enclosing else child_repositories(folder)
    if not roots:
        raise DataError(f"data.repo={cfg.repo}: neither a git repository nor a folder of them", f"git init && git add . there, or {PICK}")
    return roots, ()


def _read_repository(root: Path, cfg: DataConfig, skipped: Counter[str]) -> list[Document]:
    """Tracked files of one repository that pass the filters; adds the others to `skipped`."""
    documents = []
    for path, mode in _tracked(root).items():
        content = _read_tracked(root, path, mode, cfg)
        if isinstance(content, str):
            skipped[content] += 1
            continue
        reason = content_skip_reason(path, content)
        if reason:
            skipped[reason] += 1
            continue
        documents.append(Document(root.name, path, content.decode("utf-8-sig")))
    return documents


def _tracked(root: Path) -> dict[str, str]:
    """Path → mode of every file in git's index; a path in conflict is listed several times there and counts once."""
    # A git hook exports GIT_DIR and the like, which would override the folder we ask about.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "ls-files", "--stage", "-z"]
    try:
        listing = subprocess.run(command, capture_output=True, check=True, env=environment).stdout
    except FileNotFoundError:
        raise DataError("git is not installed, and only files that git tracks are read", "install git, or use data=jsonl") from None
    except subprocess.CalledProcessError as error:
        said = (os.fsdecode(error.stderr).strip().splitlines() or ["no message"])[0]
        raise DataError(f"{root}: git cannot list its files: {said}", "make `git ls-files` work there, or " + PICK) from None
    tracked = {}
    for entry in listing.split(b"\0")[:-1]:
        attributes, _, path = entry.partition(b"\t")
        tracked[os.fsdecode(path)] = attributes.split()[0].decode()
    return tracked


def _read_tracked(root: Path, path: str, mode: str, cfg: DataConfig) -> bytes | str:
    """The bytes of a tracked file, or the reason (text) it is skipped before it is read."""
    if mode in (SYMLINK, SUBMODULE):
        return "symlink" if mode == SYMLINK else "submodule"
    file = root / path
    try:
        status = file.lstat()
        # The working tree may differ from the index: the file, or a folder above it, may have become a link to anywhere.
        if stat.S_ISLNK(status.st_mode) or not file.resolve().is_relative_to(root.resolve()):
            return "symlink"
        if not stat.S_ISREG(status.st_mode):
            return "not a file"
        return path_skip_reason(path, status.st_size, cfg.max_file_bytes, cfg.exclude) or file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError:
        return "unreadable"


def jsonl_documents(cfg: DataConfig) -> Reading:
    """Documents of a JSON-lines file, one object a line.

    Raises:
        DataError: no such file, or a line that is not UTF-8, not a JSON object or has no text; it names the line.
    """
    file = _local_path(cfg)
    if not file.is_file():
        raise DataError(f"data.path={cfg.path} is not a file", "data.path=FILE.jsonl names a file with one JSON object a line")
    records: list[tuple[int, Mapping[str, Any]]] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise DataError(f"{file}, line {number}: not JSON ({error})", "correct or remove that line") from None
            if not isinstance(record, dict):
                raise DataError(f"{file}, line {number}: not a JSON object", f'write {{"{cfg.text_field}": "…"}}')
            records.append((number, record))
    return _records_reading(str(file), records, cfg, "line")


def hf_documents(cfg: DataConfig) -> Reading:
    """Documents of a local `datasets` folder: one written by `save_to_disk`, or one that holds parquet, json, csv or text files.

    Of several splits `train` is taken, or the first where none has that name.

    Raises:
        DataError: no such folder, `datasets` cannot load it, or a record has no text.
    """
    import datasets  # here, because it takes a second to import and most runs read git

    folder = _local_path(cfg)
    if not folder.is_dir():
        problem = f"data.path={cfg.path} is not a folder; data sets are read from disk only"
        raise DataError(problem, "save_to_disk(FOLDER), then data.path=FOLDER")
    saved = any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json"))
    try:
        loaded = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"data.path={cfg.path}: datasets cannot load it: {said}", "save it anew with save_to_disk(FOLDER)") from None
    notes: tuple[str, ...] = ()
    if isinstance(loaded, datasets.DatasetDict):
        split = "train" if "train" in loaded else next(iter(loaded))
        notes = (f"split {split} of {', '.join(loaded)}",)
        loaded = loaded[split]
    return _records_reading(str(folder), enumerate(loaded, start=1), cfg, "record", notes)


def _local_path(cfg: DataConfig) -> Path:
    """`data.path`, which must be set and exist."""
    if not cfg.path:
        raise DataError(f"data.path is unset, and data.source={cfg.source} reads from it", "data.path=PATH names a local file or folder")
    path = Path(cfg.path).expanduser()
    if not path.exists():
        raise DataError(f"data.path={cfg.path}: there is no such file or folder", "data.path=PATH names a local file or folder")
    return path


def _records_reading(
    origin: str, records: Iterable[tuple[int, Mapping[str, Any]]], cfg: DataConfig, counted: str, notes: tuple[str, ...] = ()
) -> Reading:
    """Numbered records → documents. They are text already, so of the filters only 'excluded', 'empty' and 'not utf-8' apply."""
    documents: list[Document] = []
    skipped: Counter[str] = Counter()
    for number, record in records:
        text = record.get(cfg.text_field)
        if not isinstance(text, str):
            fields = ", ".join(map(str, record)) or "none"
            problem = f"{origin}, {counted} {number}: no text in field {cfg.text_field} (fields: {fields})"
            raise DataError(problem, "data.text_field=NAME names the field")
        path, repo = (_name(record, field, f"{counted} {number}") for field in (cfg.path_field, cfg.repo_field))
        if excluded(path, cfg.exclude):
            skipped["excluded"] += 1
        elif not text.strip():
            skipped["empty"] += 1
        elif not is_utf8(repo + path + text):
            skipped["not utf-8"] += 1
        else:
            documents.append(Document(repo, path, text))
    return Reading(origin, tuple(documents), dict(skipped), notes)


def _name(record: Mapping[str, Any], field: str, otherwise: str) -> str:
    """A record's repository or path; where it has none, its number, so that it stands alone."""
    value = record.get(field)
    return otherwise if value is None or value == "" else str(value)
