"""Part of the stress test: the disk of the cache folder."""

import os
import tempfile
import time
from pathlib import Path

from elite.hardware.detect import disk_free

PIECE = 2**24
ROOM = 4
"""The disk must have so many times the test's bytes free."""
LONGEST_S = 6.0
"""Of writing; a slow disk is measured by what it took until then."""


def disk(folder: Path, size: int) -> dict[str, float]:
    """Bytes a second written to and read from a file in `folder`, past the system's cache; 0 where there is no room for `size` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    if disk_free(folder) < ROOM * size:
        return {"disk_write_bytes": 0.0, "disk_read_bytes": 0.0}
    # Some disks compress.
    piece = os.urandom(PIECE)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="disk_test_", buffering=0) as file:
        began, written = time.perf_counter(), 0
        while written < size and time.perf_counter() - began < LONGEST_S:
            written += file.write(piece)
            os.fsync(file.fileno())
        took = time.perf_counter() - began
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(PIECE):
            pass
        return {"disk_write_bytes": written / took, "disk_read_bytes": written / (time.perf_counter() - began)}
