"""What a process takes of its machine while something runs: host memory, and device memory by the driver's account."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pynvml
import torch

from elite.executor.streamed.rows import give_back
from elite.hardware import visible
from elite.training.heap import let_go

EVERY_S = 0.005
"""Between two readings of what has no peak of its own."""
RESET = "5"
"""Written to `clear_refs`, sets a process's highest resident memory back to what it has now (Linux, proc(5))."""


class Sampled:
    """The highest value that a function gave while this was entered, read by a thread."""

    def __init__(self, read: Callable[[], float]) -> None:
        self._read, self._over = read, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._lock = threading.Lock()
        self.peak = 0.0

    def forget(self) -> None:
        """What was read so far, and what is being read."""
        with self._lock:
            self.peak = 0.0

    def __enter__(self) -> "Sampled":
        self._take()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._take()

    def _watch(self) -> None:
        while not self._over.wait(EVERY_S):
            self._take()

    def _take(self) -> None:
        with self._lock:
            self.peak = max(self.peak, self._read())


class DriverMemory:
    """Device memory that the driver counts as this process's, in bytes.

    Made before CUDA begins. Where the driver does not say what each process takes, as in many containers, it is what is in use beyond what
    was in use then: right as long as nobody else works on the card.

    Args:
        nvml: the driver's library, pynvml.
    """

    def __init__(self, nvml: Any = pynvml) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        uuids = [uuid.decode() if isinstance(uuid := nvml.nvmlDeviceGetUUID(handle), bytes) else uuid for handle in handles]
        self._handle = handles[visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))[0]]
        self._others = 0 if torch.cuda.is_initialized() else self._used()
        self.method = "total"
        """`process`, or `total` less what was in use before."""

    def settle(self) -> None:
        """Once CUDA works: tell this process's part from that of others, if the driver does."""
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return
        own = [process for process in processes if process.pid == os.getpid()]
        # Another name space gives this process another number; alone on the card it is still the one.
        own = own or (processes if len(processes) == 1 else [])
        if own and own[0].usedGpuMemory:
            self._others, self.method = self._used() - int(own[0].usedGpuMemory), "process"

    def read(self) -> float:
        """In use now."""
        return float(self._used() - self._others)

    def _used(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)


class ResidentMemory:
    """Highest resident memory of this process since it was made, beyond what it had then; bytes."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.baseline = self._process.memory_info().rss
        self.by_kernel = _reset()
        """Whether the kernel keeps the peak; else it is as good as its readings."""
        self._sampled = Sampled(lambda: float(self._process.memory_info().rss))
        self._before = 0.0

    def __enter__(self) -> "ResidentMemory":
        if not self.by_kernel:
            self._sampled.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.by_kernel:
            self._sampled.__exit__(kind, error, trace)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What comes within does not count."""
        self._before = self.growth
        yield
        give_back()
        if self.by_kernel:
            _reset()
        else:
            self._sampled.forget()

    @property
    def growth(self) -> float:
        """So far."""
        return max(self._before, (_highest() if self.by_kernel else self._sampled.peak) - self.baseline)


def _reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(RESET)
    except OSError:
        return False
    # Some sandboxes take the word and do nothing.
    return abs(_highest() - psutil.Process().memory_info().rss) < 0.02 * _highest()


def _highest() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024.0 * int(line.split()[1])
    return 0.0


def free_host_memory() -> None:
    """Give what is not used back to the system: garbage, torch's cached pinned memory, the heap's free pages."""
    let_go()
    if torch.cuda.is_initialized():
        # Its name since torch 2.12, and the one before.
        empty = getattr(torch._C, "_accelerator_emptyHostCache", None) or getattr(torch._C, "_host_emptyCache", None)
        if empty is not None:
            empty()
    give_back()
