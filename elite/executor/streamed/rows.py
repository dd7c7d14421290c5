"""Where rows of bytes wait between their writing and their reading: on the device, in pinned host memory, in a file on disk.

A boundary, a gradient, an attention output, keys and values are all [tokens, row_bytes] of uint8 here; what the bytes mean is the
caller's business. Chunks are ranges of rows.
"""

import ctypes
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elite import hardware
from elite.errors import PlanError
from elite.facts import GIB
from elite.streaming import Place

HOST_RESERVE_BYTES = 2 * GIB
"""Host memory left for everything else when rows are allocated."""


class Rows:
    """`count` rows of `row_bytes` bytes at one place.

    `written` holds, by a chunk's first row, the row after its last and what tells that its bytes have arrived: a CUDA event, or a
    thread's future on disk. `changed` tells whether anything was written since that was last set back.
    """

    def __init__(self, storage: Tensor, place: Place) -> None:
        self.storage, self.place = storage, place
        self.written: dict[int, tuple[int, Any]] = {}
        self.changed = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.storage.shape[1]

    def part(self, start: int, stop: int) -> Tensor:
        """Rows start … stop − 1 where they are."""
        return self.storage[start:stop]

    def under_way(self, start: int, stop: int) -> list[Any]:
        """What a reader of these rows has to wait for."""
        arrived = [first for first, (_, event) in self.written.items() if event is None or _done(event)]
        for first in arrived:
            del self.written[first]
        return [event for first, (end, event) in self.written.items() if first < stop and start < end]

    def arrive(self) -> None:
        """Wait for everything that is on its way here."""
        for _, event in self.written.values():
            if isinstance(event, Future):
                event.result()
            elif event is not None:
                event.synchronize()
        self.written.clear()


def _done(event: Any) -> bool:
    return bool(event.done() if isinstance(event, Future) else event.query())


class Allocator:
    """Makes rows, and keeps them from step to step: pinning host memory takes seconds a GiB.

    Args:
        device: where the model computes; host memory is pinned for a CUDA device.
        folder: where files of rows lie; only needed for `Place.disk`.
        lasting: the files outlive the process: they lie in `folder` itself, and those of an earlier process are taken over.
    """

    def __init__(self, device: torch.device, folder: Path | None, lasting: bool = False) -> None:
        self._device, self._folder, self._lasting = device, folder, lasting
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._rows: dict[str, Rows] = {}
        self.disk = ThreadPoolExecutor(max_workers=2, thread_name_prefix="rows")

    def rows(self, name: str, place: Place, count: int, row_bytes: int) -> Rows:
        """The rows called `name`, made anew only where they are too small or of another width.

        Raises:
            PlanError: the host or the disk has no room for them.
        """
        known = self._rows.get(name)
        if known is not None and known.place is place and known.row_bytes == row_bytes and known.storage.shape[0] >= count:
            return known
        self._rows.pop(name, None)
        made = self._rows[name] = Rows(self._storage(name, place, count, row_bytes), place)
        return made

    def known(self, name: str) -> Rows:
        """The rows called `name`, which exist."""
        return self._rows[name]

    def host_bytes(self) -> int:
        """Host memory that all rows take."""
        return sum(rows.storage.numel() for rows in self._rows.values() if rows.place is Place.host)

    def device_bytes(self, names: Collection[str]) -> int:
        """Device memory that rows of these names take."""
        return sum(rows.storage.numel() for name, rows in self._rows.items() if name in names and rows.place is Place.device)

    def settled(self) -> Iterator[tuple[str, Rows]]:
        """Rows that have changed since they last came up here, each once all its bytes are where they belong."""
        for name, rows in self._rows.items():
            if rows.changed:
                rows.arrive()
                rows.changed = False
                yield name, rows

    def release_disk(self) -> None:
        """Give what lies on disk back, as far as nobody holds it any more."""
        self._rows = {name: rows for name, rows in self._rows.items() if rows.place is not Place.disk}
        self._delete_files()

    def release(self) -> None:
        """Give everything back; files are deleted unless they are lasting."""
        self._rows.clear()
        self._delete_files()

    def _delete_files(self) -> None:
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def _storage(self, name: str, place: Place, count: int, row_bytes: int) -> Tensor:
        size = count * row_bytes
        if place is Place.device:
            return torch.empty(count, row_bytes, dtype=torch.uint8, device=self._device)
        if place is Place.host:
            free = hardware.host_memory()[1] - HOST_RESERVE_BYTES
            if size > free:
                raise PlanError(
                    f"{name} takes {size / GIB:.1f} GiB of host memory, {max(0, free) / GIB:.1f} GiB are free",
                    "executor.keep=multilevel, executor.encoding=int4 or executor.boundaries=disk",
                )
            return pinned(count, row_bytes, self._device)
        return self._file(name, size).view(count, row_bytes)

    def _file(self, name: str, size: int) -> Tensor:
        if self._folder is None:
            raise PlanError("executor.boundaries=disk needs a folder for its files", "executor.folder=FOLDER on a fast disk")
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._files is None and not self._lasting:
            self._files = tempfile.TemporaryDirectory(prefix="boundaries_", dir=self._folder)
        path = (self._folder if self._files is None else Path(self._files.name)) / name
        if self._lasting and path.is_file() and path.stat().st_size >= size:
            return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        free = shutil.disk_usage(path.parent).free
        if size > free:
            where = "output.root" if self._lasting else "executor.folder"
            raise PlanError(f"{name} takes {size / GIB:.1f} GiB on disk, {free / GIB:.1f} GiB are free", f"{where}= on a larger disk")
        # A new file: truncating one that is still mapped would kill whoever touches it.
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            # Blocks are taken now: a disk that fills up under a memory map would kill the process.
            os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


class _Pages(mmap.mmap):
    """Anonymous pages that are page-locked for CUDA from `lock` to their end."""

    locked = False

    def lock(self, pages: Tensor) -> None:
        """Register them with the driver; `pages` is a tensor over this very memory."""
        self._unlock = _lock(pages)
        self.locked = True

    def __del__(self) -> None:
        if self.locked:
            self._unlock()


def _lock(pages: Tensor) -> Callable[[], object]:
    """Page-lock a tensor's memory; returns what undoes it."""
    driver, address = torch.cuda.cudart(), pages.data_ptr()
    # Flag 1, portable: locked for every CUDA context of the process.
    code = int(driver.cudaHostRegister(address, pages.numel(), 1))
    if code:
        raise PlanError(
            f"{pages.numel() / GIB:.1f} GiB of host memory cannot be page-locked (CUDA error {code})",
            "raise the limit on locked memory (ulimit -l), or executor.boundaries=disk",
        )
    return lambda: driver.cudaHostUnregister(address)


def give_back() -> None:
    """Give free pages of the heap back to the system: glibc keeps those of tensors up to 32 MiB, once larger ones have come and gone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def pinned(count: int, row_bytes: int, device: torch.device) -> Tensor:
    """[count, row_bytes] of uint8 in host memory, page-locked if `device` is a GPU.

    torch's own pinned allocator rounds every size up to a power of two; registering ordinary pages takes what is asked for.
    """
    size = count * row_bytes
    if device.type != "cuda" or size == 0:
        return torch.empty(count, row_bytes, dtype=torch.uint8)
    memory = _Pages(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    # Touched by torch's threads first: the driver would fault the pages in one by one.
    pages.zero_()
    memory.lock(pages)
    return pages[:size].view(count, row_bytes)
