"""Time and memory of a call on one device, and how far its results are from those expected.

On a GPU the cache is flushed before every call. The flush also takes longer than the host needs to launch a call's kernels, so that what
lies between the two events is the device's time, not the host's.
"""

import time
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 * 1024**2
FLUSHES = 20
"""About two milliseconds on a GPU with 3 TB/s: a forward and a backward through autograd take a host half of that."""
WARM_UPS = 3
FEWEST, MOST = 5, 200
"""Calls that are timed."""
QUANTILES = (0.2, 0.5, 0.8)


class Clock:
    """Times calls.

    Args:
        fill_ms: how long a call is repeated, the flushes included.
    """

    def __init__(self, device: torch.device, fill_ms: float = 60.0) -> None:
        self.device, self._fill_ms = device, fill_ms
        self._flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def first(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """What a first call gives, and its seconds, which are those of compilers."""
        began = time.perf_counter()
        given = call()
        self._wait()
        return given, time.perf_counter() - began

    def quantiles(self, call: Callable[[], Any]) -> list[float]:
        """Milliseconds of a call at `QUANTILES`."""
        for _ in range(WARM_UPS):
            call()
        self._wait()
        began = time.perf_counter()
        self._timed(call, 2)
        each_ms = (time.perf_counter() - began) * 1e3 / 2
        found = torch.tensor(self._timed(call, min(MOST, max(FEWEST, ceil(self._fill_ms / each_ms)))), dtype=torch.float64)
        return [float(value) for value in found.quantile(torch.tensor(QUANTILES, dtype=torch.float64))]

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Device memory at most, beyond what was there before, results included; None on a CPU."""
        if self.device.type != "cuda":
            return None
        self._wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        given = call()
        self._wait()
        del given
        return torch.cuda.max_memory_allocated(self.device) - before

    def copy_gb_s(self) -> float:
        """Bytes read and written a nanosecond by a large copy within the device."""
        source = torch.ones(2**30 if self.device.type == "cuda" else 2**20, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.quantiles(lambda: target.copy_(source))[1] / 1e6

    def _timed(self, call: Callable[[], Any], repeats: int) -> list[float]:
        if self.device.type != "cuda":
            return [1e3 * self.first(call)[1] for _ in range(repeats)]
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in marks:
            for _ in range(FLUSHES):
                self._flush.zero_()
            begin.record()
            call()
            end.record()
        self._wait()
        return [begin.elapsed_time(end) for begin, end in marks]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def as_tuple(given: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """One tensor or several as several."""
    return (given,) if isinstance(given, Tensor) else tuple(given)


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of a tensor, in the 2-norm, in fp32."""
    return max(map(_error, found, expected))


def _error(found: Tensor, expected: Tensor) -> float:
    right = expected.detach().float()
    size = float(right.norm())
    off = float((found.detach().float() - right).norm())
    return off / size if size else off
