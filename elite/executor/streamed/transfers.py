"""Copies between where rows wait and the device, on their own streams, a chunk ahead of the computation.

What comes goes through fixed staging buffers, what leaves stays alive until it has left; two of each for each kind of row, so that
memory does not depend on timing. Nothing here makes the host wait for the GPU, except where rows lie on disk.

    host → device    issued one chunk ahead; the compute stream waits for the copy's event, the copy for the buffer's last use
    device → host    issued at once; the compute stream waits only before the tensor before the last one is given up
    disk             a thread moves bytes between the memory-mapped file and a pinned staging buffer
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elite.chunks import Chunk
from elite.executor.streamed.rows import Rows, pinned
from elite.streaming import Place

AHEAD = 2
"""Chunks whose copies are under way or done while one is worked on, it included: double buffering."""

Fields = dict[str, Rows]
"""What a pass reads of every chunk, by kind."""


@dataclass
class _Buffer:
    """One staging buffer [rows, row_bytes] on the device, and its like on the host for rows on disk."""

    device: Tensor
    free: Any
    """Event after which the device buffer may be overwritten."""
    host: Tensor | None = None
    host_free: Any = None
    """Event or future after which the host buffer may be."""


@dataclass
class _Outgoing:
    """What is on its way from the device: the tensor stays alive until the computation has waited for its copy."""

    data: Tensor | None = None
    copied: Any = None
    """Event after which `data` has left the device."""
    host: Tensor | None = None
    """For rows on disk: pinned memory in between."""
    stored: Future[None] | None = None
    """After which `host` may be overwritten."""


@dataclass
class _Request:
    """A chunk whose copies have been issued."""

    chunk: Chunk
    fields: Fields
    tensors: dict[str, Tensor]
    buffers: list[_Buffer]
    loads: list[Future[None]]
    """Disk reads that the copy to the device still waits for."""
    loaded: Any = None


class Transfers:
    """Moves chunks of rows to the device and back.

    Args:
        device: where the model computes. On a CPU all copies are immediate.
        most: rows of the longest chunk.
        disk: runs the threads that move bytes from and to disk.
    """

    def __init__(self, device: torch.device, most: int, disk: ThreadPoolExecutor) -> None:
        self._device, self._most, self._disk = device, most, disk
        self._cuda = device.type == "cuda"
        # A CPU has no streams and copies at once.
        self._inward: Any
        self._outward: Any
        self._inward, self._outward = (torch.cuda.Stream(device) if self._cuda else None for _ in range(2))
        self._buffers: dict[str, deque[_Buffer]] = {}
        self._outgoing: dict[str, deque[_Outgoing]] = {}
        self._early: deque[_Request] = deque()
        self._copied_in: Any = None

    def read(self, order: Sequence[Chunk], fields: Fields, then: tuple[Sequence[Chunk], Fields] | None = None) -> Iterator[Any]:
        """Yield `(chunk, {kind: uint8 [chunk.length, row_bytes] on the device})` for each chunk of `order`.

        A yielded tensor is valid until the next one is asked for.

        Args:
            then: what the next call will read; its first chunks are brought while this one ends.
        """
        coming = self._requests(order, fields, then)
        queue: deque[_Request] = deque()
        if self._early and (self._early[0].chunk is not order[0] or self._early[0].fields != fields):
            # What was announced did not come: a backward that ends early, an evaluation in between.
            self.reset()
        while self._early:
            queue.append(self._early.popleft())
            next(coming)
        # The next pass may read what this one has yet to write: its chunks are asked for only while this one's are consumed.
        for _ in range(min(AHEAD, len(order)) - len(queue)):
            self._issue_next(coming, queue)
        for _ in range(len(order)):
            request = queue.popleft()
            self._land(request)
            yield request.chunk, request.tensors
            self._consumed(request)
            self._issue_next(coming, queue)
        self._early = queue

    def write(self, kind: str, rows: Rows, chunk: Chunk, data: Tensor) -> None:
        """Copy `data` [chunk.length, row_bytes] (uint8, on the device) to where these rows wait. Nobody may write to `data` any more."""
        target = rows.part(chunk.start, chunk.stop)
        rows.changed = True
        if rows.place is Place.device:
            target.copy_(data)
            return
        going = self._next_outgoing(kind, rows)
        # Only what is computed after this may take the place of the tensor that went before.
        self._compute_waits(going.copied)
        going.data = data
        if going.stored is not None:
            going.stored.result()
        self._after_compute(self._outward)
        with self._on(self._outward):
            (target if going.host is None else going.host[: chunk.length]).copy_(data, non_blocking=True)
            going.copied = self._event(self._outward)
        if going.host is not None:
            going.stored = self._disk.submit(_store, going.host[: chunk.length], target, going.copied)
        rows.written[chunk.start] = (chunk.stop, going.stored or going.copied)

    def copy_in(self, target: Tensor, rows: Rows, chunk: Chunk) -> None:
        """Begin to copy a chunk's rows into `target` on the device, once all computation so far is done; `settle` waits for it."""
        if self._cuda:
            self._inward.wait_stream(torch.cuda.current_stream(self._device))
        with self._on(self._inward):
            for event in rows.under_way(chunk.start, chunk.stop):
                self._wait(self._inward, event)
            target.copy_(rows.part(chunk.start, chunk.stop), non_blocking=True)
            self._copied_in = self._event(self._inward)

    def settle(self) -> None:
        """Make the computation wait for what `copy_in` began, not for what `read` has asked for ahead."""
        self._compute_waits(self._copied_in)

    def reset(self) -> None:
        """Forget what has been asked for ahead. Its copies are waited for: buffers may be given up now."""
        for request in self._early:
            for load in request.loads:
                load.result()
            self._compute_waits(request.loaded)
        self._early.clear()

    def _requests(
        self, order: Sequence[Chunk], fields: Fields, then: tuple[Sequence[Chunk], Fields] | None
    ) -> Iterator[tuple[Chunk, Fields]]:
        yield from ((chunk, fields) for chunk in order)
        if then is not None:
            yield from ((chunk, then[1]) for chunk in then[0][:AHEAD])

    def _issue_next(self, coming: Iterator[tuple[Chunk, Fields]], queue: deque[_Request]) -> None:
        following = next(coming, None)
        if following is None:
            return
        chunk, fields = following
        request = _Request(chunk, fields, {}, [], [])
        for kind, rows in fields.items():
            self._fetch(kind, rows, request)
        if not request.loads:
            request.loaded = self._event(self._inward)
        queue.append(request)

    def _fetch(self, kind: str, rows: Rows, request: _Request) -> None:
        chunk = request.chunk
        source = rows.part(chunk.start, chunk.stop)
        if rows.place is Place.device:
            request.tensors[kind] = source
            return
        buffer = self._next_buffer(kind, rows)
        staged = request.tensors[kind] = buffer.device[: chunk.length]
        request.buffers.append(buffer)
        written = rows.under_way(chunk.start, chunk.stop)
        if rows.place is Place.disk:
            request.loads.append(self._disk.submit(_load, buffer, source, written))
            return
        with self._on(self._inward):
            for event in written:
                self._wait(self._inward, event)
            self._wait(self._inward, buffer.free)
            staged.copy_(source, non_blocking=True)

    def _land(self, request: _Request) -> None:
        """Make the computation wait for what has been asked for."""
        if request.loads:
            for load in request.loads:
                load.result()
            with self._on(self._inward):
                for buffer in request.buffers:
                    if buffer.host is not None:
                        self._wait(self._inward, buffer.free)
                        buffer.device[: request.chunk.length].copy_(buffer.host[: request.chunk.length], non_blocking=True)
                        buffer.host_free = self._event(self._inward)
            request.loaded = self._event(self._inward)
        self._compute_waits(request.loaded)

    def _consumed(self, request: _Request) -> None:
        event = self._computed()
        for buffer in request.buffers:
            buffer.free = event

    def _next_outgoing(self, kind: str, rows: Rows) -> _Outgoing:
        ring = self._outgoing.setdefault(f"{kind}/{rows.place.value}", deque())
        if len(ring) < AHEAD:
            ring.append(_Outgoing())
        else:
            ring.rotate(-1)
        going = ring[-1]
        if rows.place is Place.disk and (going.host is None or going.host.shape[1] != rows.row_bytes):
            going.host = pinned(self._most, rows.row_bytes, self._device)
        return going

    def _next_buffer(self, kind: str, rows: Rows) -> _Buffer:
        ring = self._buffers.setdefault(f"{kind}/{rows.row_bytes}", deque())
        if len(ring) < AHEAD:
            made = torch.empty(self._most, rows.row_bytes, dtype=torch.uint8, device=self._device)
            # The computation may still have to come to who had this memory before.
            ring.append(_Buffer(made, free=self._computed()))
        else:
            ring.rotate(-1)
        buffer = ring[-1]
        if rows.place is Place.disk and buffer.host is None:
            buffer.host = pinned(self._most, rows.row_bytes, self._device)
        return buffer

    def _on(self, stream: Any) -> Any:
        return torch.cuda.stream(stream) if self._cuda else nullcontext()

    def _event(self, stream: Any) -> Any:
        return stream.record_event() if self._cuda else None

    def _computed(self) -> Any:
        """Event after all that the computation has been given so far."""
        return self._event(torch.cuda.current_stream(self._device)) if self._cuda else None

    def _wait(self, stream: Any, event: Any) -> None:
        if self._cuda and event is not None:
            stream.wait_event(event)

    def _compute_waits(self, event: Any) -> None:
        if self._cuda and event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def _after_compute(self, stream: Any) -> None:
        if self._cuda:
            stream.wait_stream(torch.cuda.current_stream(self._device))


def _load(buffer: _Buffer, source: Tensor, written: list[Any]) -> None:
    """In a thread: bytes of a file into pinned memory, once they are there and the buffer is free."""
    for store in written:
        store.result()
    if buffer.host_free is not None:
        buffer.host_free.synchronize()
    assert buffer.host is not None
    buffer.host[: len(source)].copy_(source)


def _store(staged: Tensor, target: Tensor, arrived: Any) -> None:
    """In a thread: bytes that have arrived in pinned memory into the file."""
    if arrived is not None:
        arrived.synchronize()
    target.copy_(staged)
