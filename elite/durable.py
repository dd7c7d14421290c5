"""What is on the disk when a function returns, so that a machine that goes down then loses none of it."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's bytes, those of memory maps included, or a folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put(partial: Path, path: Path) -> None:
    """Give a file that is written whole its name, in place of what had it."""
    sync(partial)
    partial.replace(path)
    sync(path.parent)
