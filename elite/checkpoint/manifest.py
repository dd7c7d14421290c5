"""The manifest: which files make up a checkpoint, their sizes and hashes, and whether they are all there as they were written."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from elite.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
"""Of what is written. Checkpoints from before formats were counted have manifests without one: they map names to fingerprints, no more."""


@dataclass(frozen=True)
class Manifest:
    """What a manifest says."""

    format: int
    step: int | None
    val_loss: float | None
    """In nats; None if the step was not validated."""
    files: dict[str, Any]
    """Size in bytes and SHA-256 by path within the checkpoint."""


class Damaged(Exception):
    """Something in a checkpoint is not as it was written: the file, and what is wrong with it."""


def seal(folder: Path, step: int, val_loss: float | None) -> None:
    """Write the manifest of what is in `folder`."""
    files = {name: _fingerprint(folder / name) for name in sorted(_plain_files(folder))}
    content = {"format": FORMAT, "step": step, "val_loss": val_loss, "files": files}
    (folder / MANIFEST).write_text(_text(content | {"sha256": _hash_of(content)}))


def read(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint, unaltered; its files are not looked at.

    Raises:
        Damaged: it is missing, altered or no manifest.
        OSError: it cannot be read.
    """
    try:
        raw = (checkpoint / MANIFEST).read_bytes()
        content = json.loads(raw)
    except FileNotFoundError as error:
        raise Damaged(f"{MANIFEST} is missing") from error
    except ValueError as error:
        raise Damaged(f"{MANIFEST} is altered") from error
    if not isinstance(content, dict):
        raise Damaged(f"{MANIFEST} is altered")
    if "format" not in content:
        return Manifest(0, None, None, content)
    sealed = {name: value for name, value in content.items() if name != "sha256"}
    # It must be what would be written for its content, to the byte: then no bit of it is another.
    if content.get("sha256") != _hash_of(sealed) or raw != _text(content).encode():
        raise Damaged(f"{MANIFEST} is altered")
    found = Manifest(content["format"], content.get("step"), content.get("val_loss"), content.get("files", {}))
    if not (isinstance(found.files, dict) and isinstance(found.val_loss, (int, float, NoneType))):
        raise Damaged(f"{MANIFEST} is none")
    return found


def fault(checkpoint: Path, step: int) -> str:
    """What is wrong with a checkpoint, in words; empty if every file is there as it was written, and no other.

    Args:
        step: that its name says.

    Raises:
        CheckpointError: it was written by a later version, which this one cannot judge.
    """
    try:
        present = set(_plain_files(checkpoint))
        manifest = read(checkpoint)
        if manifest.format not in (0, FORMAT):
            raise CheckpointError(
                f"{checkpoint} has format {manifest.format}, this version reads up to {FORMAT}",
                "the version that wrote it, or resume=never",
            )
        if manifest.step not in (None, step):
            return f"{MANIFEST} is that of step {manifest.step}"
        return next(_wrong(checkpoint, manifest, present - {MANIFEST}), "")
    except Damaged as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def _wrong(checkpoint: Path, manifest: Manifest, present: set[str]) -> Iterator[str]:
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            yield f"{MANIFEST} names {name}, which is outside"
    for name in sorted(present - manifest.files.keys()):
        yield f"{name} is not in {MANIFEST}"
    for name in sorted(manifest.files.keys() - present):
        yield f"{name} is missing"
    for name, expected in manifest.files.items():
        found = _fingerprint(checkpoint / name)
        if found != expected:
            size = expected.get("bytes") if isinstance(expected, dict) else None
            yield f"{name} is altered" if size == found["bytes"] else f"{name} has {found['bytes']:,} bytes, not {size}"


def _plain_files(folder: Path) -> Iterator[str]:
    """Paths of all files within.

    Raises:
        Damaged: there is something else, which was not written here: links lead outside, and reading a pipe would wait for ever.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            mode = path.lstat().st_mode
            relative = path.relative_to(folder).as_posix()
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise Damaged(f"{relative} is neither file nor folder")
            if stat.S_ISREG(mode):
                yield relative


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True)


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()
