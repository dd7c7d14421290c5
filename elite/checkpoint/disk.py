"""Files that are whole or not there, and what to say of a disk that takes no more."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from elite.durable import put, sync
from elite.errors import CheckpointError

SLACK_BYTES = 2**20
"""Beside its tensors a checkpoint has small files, and a disk gives room in blocks."""
FULL = (errno.ENOSPC, errno.EDQUOT)


class Unsaved(CheckpointError):
    """A checkpoint could not be written; those written before are as they were."""


def why(error: OSError | SafetensorError) -> str | None:
    """What kept a file from being written, in the system's words; None if it was no matter of the disk."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # The library's own type for everything; in it the system's error is named so.
    _, found, reason = str(error).partition("I/O error: ")
    return reason if found else None


def unsaved(step: int, folder: Path, need: int, reason: str) -> Unsaved:
    """The error to raise, with what to free.

    Args:
        need: bytes that the checkpoint takes.
    """
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    problem = f"checkpoint of step {step} is not saved: {need:,} bytes needed, {free:,} free in {folder} ({reason})"
    return Unsaved(problem, f"free {need - free:,} bytes there" if need > free else f"let files of that size be written in {folder}")


def require_room(folder: Path, need: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OSError: it has fewer than `need` bytes free, or does not say.
    """
    if shutil.disk_usage(folder).free < need:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or, after a crash or on a full disk, as it was before."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.write_text(text)
        put(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder that is there whole or not at all; what was there under its name is gone only when the new one is on the disk."""
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        fill(partial)
        for written in [*partial.rglob("*"), partial]:
            sync(written)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync(path.parent)


@contextmanager
def disk_trouble(folder: Path) -> Iterator[None]:
    """Within, a full disk ends the run in words.

    Raises:
        CheckpointError: something could not be written for want of room.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = why(error)
        if reason is None or (isinstance(error, OSError) and error.errno not in FULL):
            raise
        where = error.filename if isinstance(error, OSError) and error.filename else folder
        free = shutil.disk_usage(folder).free
        problem = f"{where} could not be written: {reason} ({free:,} bytes free in {folder})"
        raise CheckpointError(problem, "free space there; the same command continues from the last checkpoint") from error
