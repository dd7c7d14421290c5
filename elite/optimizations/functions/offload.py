"""Host memory for what autograd keeps from forward to backward."""

import weakref
from collections import deque

import torch
from torch import Tensor


class _Kept:
    """One tensor on the shelf."""

    def __init__(self, tensor: Tensor, host: Tensor, previous: "weakref.ref[_Kept] | None") -> None:
        self.target, self.host, self.previous = tensor.device, host, previous
        self.on_device: Tensor | None = None
        """While it is still there after being stored, or there again for its use."""
        self.copied: torch.cuda.Event | None = None
        """The end of the last copy that touches `on_device`."""

    def release(self) -> Tensor | None:
        """Hand out the device's tensor and forget it; the current stream goes on when its copy is over."""
        tensor, self.on_device = self.on_device, None
        if tensor is not None and self.copied is not None:
            torch.cuda.current_stream(self.target).wait_event(self.copied)
        return tensor

    def __del__(self) -> None:
        # A backward pass that was abandoned: the memory may serve others only after the copy.
        self.release()


class HostShelf:
    """Host memory for tensors that autograd saves, last in, first out. A tensor of the CPU is cloned, for the same code path.

    Args:
        in_flight: tensors that may be on the device at once while they are stored.
    """

    def __init__(self, in_flight: int) -> None:
        self._in_flight = in_flight
        self._leaving: deque[_Kept] = deque()
        self._last: weakref.ref[_Kept] | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def pack(self, tensor: Tensor) -> _Kept:
        """Start storing `tensor`."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        kept = _Kept(tensor, host, self._last)
        if not tensor.is_cuda:
            # Also the empty tensor that checkpoint saves beside its arguments.
            host.copy_(tensor)
            return kept
        self._last = weakref.ref(kept)
        # Before this layer's work is queued: waiting for an older copy now costs nothing if that was fast enough.
        while len(self._leaving) >= self._in_flight:
            self._leaving.popleft().release()
        kept.on_device = tensor.detach()
        kept.copied = self._copy(tensor, host)
        self._leaving.append(kept)
        return kept

    def unpack(self, kept: _Kept) -> Tensor:
        """The tensor again, and start fetching the one that was stored before it."""
        if kept.target.type != "cuda":
            return kept.host
        if kept in self._leaving:
            self._leaving.remove(kept)
        self._fetch(kept)
        tensor = kept.release()
        assert tensor is not None
        previous = kept.previous() if kept.previous is not None else None
        if previous is not None:
            self._fetch(previous)
        return tensor

    def _fetch(self, kept: _Kept) -> None:
        if kept.on_device is None:
            kept.on_device = torch.empty_like(kept.host, device=kept.target)
            kept.copied = self._copy(kept.host, kept.on_device)

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        """Copy on the side stream, after all that the current stream has been given."""
        device = source.device if source.is_cuda else target.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        return stream.record_event()
