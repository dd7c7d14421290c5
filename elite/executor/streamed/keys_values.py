"""Keys, values and their gradients of the layer at work, for one document that spans several chunks.

They are the sources of blocks that attention reads and the sinks of the gradients it adds to: on the device, or in pinned host
memory, from where blocks come and go double-buffered. Positions count from the document's first token.

    k, v [tokens, K, D] in the compute dtype, dk and dv in fp32: many chunks add to them

The backward visits chunks last to first, so what a chunk adds lies before everything that later chunks have added to: `_low` is the
first position any chunk has added to, and what lies before it holds no gradient yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from elite.chunks import Chunk
from elite.executor.streamed.math_kernel import group_sum
from elite.executor.streamed.rows import Allocator, Rows
from elite.executor.streamed.transfers import Transfers
from elite.streaming import Place


@dataclass(frozen=True)
class Block:
    """Keys `first` … `stop` − 1 of a document."""

    first: int
    stop: int
    k: Tensor
    v: Tensor


class KeyValues:
    """See the module's docstring.

    Args:
        tokens: of the longest document that spans chunks.
        block: most keys in a block of the backward, and in every block that comes from the host.
    """

    def __init__(self, place: Place, tokens: int, block: int, allocator: Allocator, device: torch.device) -> None:
        self._place, self.tokens, self._block, self._allocator = place, tokens, block, allocator
        self._transfers = Transfers(device, min(block, tokens), allocator.disk)
        self._rows: dict[str, Rows] = {}
        self._heads: tuple[int, int] = (0, 0)
        self._dtype = torch.float32
        self._low = 0
        self._expected: Transfers | None = None
        self.holds: tuple[int, int] | None = None
        """The layer and document whose keys and values these are, by `Sweep.document`."""

    @property
    def on_device(self) -> bool:
        """Whether any range can be had as one view."""
        return self._place is Place.device

    def put(self, chunk: Chunk, k: Tensor, v: Tensor) -> None:
        """Keep a chunk's keys and values, each [chunk.length, K, D]."""
        if not self._rows or self._heads != k.shape[1:] or self._dtype is not k.dtype:
            self._allocate(k)
        first, stop = chunk.offset, chunk.offset + chunk.length
        for kind, tensor in (("k", k), ("v", v)):
            if self.on_device:
                self._typed(self._rows[kind].part(first, stop), self._dtype).copy_(tensor)
            else:
                self._write(kind, first, stop, tensor)

    def bring(self, chunk: Chunk, rows: dict[str, Rows], transfers: Transfers) -> None:
        """Begin to copy a chunk's keys and values from where they were kept, once all work so far is done; on the device alone."""
        for kind, source in rows.items():
            transfers.copy_in(self._rows[kind].part(chunk.offset, chunk.offset + chunk.length), source, chunk)

    def expect(self, transfers: Transfers) -> None:
        """What `transfers` has begun to bring is on its way: it is waited for when it is first read, behind other work."""
        self._expected = transfers

    def view(self, first: int, stop: int) -> Block:
        """One block over a whole range; on the device alone."""
        self._arrive()
        k, v = (self._typed(self._rows[kind].part(first, stop), self._dtype) for kind in ("k", "v"))
        return Block(first, stop, k, v)

    def prefix(self, stop: int) -> Iterator[Block]:
        """All keys before `stop`, for a forward pass: in one block where they lie on the device."""
        if stop == 0:
            return
        if self.on_device:
            yield self.view(0, stop)
            return
        order = [token_range(first, min(first + self._block, stop)) for first in range(0, stop, self._block)]
        for part, data in self._transfers.read(order, {kind: self._rows[kind] for kind in ("k", "v")}):
            yield Block(part.start, part.stop, *(self._typed(data[kind], self._dtype) for kind in ("k", "v")))

    @property
    def untouched(self) -> bool:
        """Whether no chunk of this document has added a gradient yet."""
        return self._low == self.tokens

    def begin_backward(self) -> None:
        """Forget the gradients of the document before."""
        self._low = self.tokens

    def gradients(self, first: int, stop: int) -> Iterator[tuple[Block, "Sink"]]:
        """Keys `first` … `stop` − 1 block by block, each with where its gradient goes."""
        self._arrive()
        fresh = stop <= self._low
        order = [token_range(a, min(a + self._block, stop)) for a in range(first, stop, self._block)]
        kinds = ("k", "v") if fresh else ("k", "v", "dk", "dv")
        for part, data in self._transfers.read(order, {kind: self._rows[kind] for kind in kinds}):
            k, v = (self._typed(data[kind], self._dtype) for kind in ("k", "v"))
            sums = None if fresh else tuple(self._typed(data[kind], torch.float32) for kind in ("dk", "dv"))
            yield Block(part.start, part.stop, k, v), Sink(self, part, sums)
        self._low = min(self._low, first)

    def own(self, chunk: Chunk) -> tuple[Tensor, Tensor] | None:
        """What later chunks have added to this chunk's keys and values, fp32; None if nothing."""
        first, stop = chunk.offset, chunk.offset + chunk.length
        if self._low >= stop:
            return None
        if self.on_device:
            dk, dv = (self._typed(self._rows[kind].part(first, stop), torch.float32) for kind in ("dk", "dv"))
            return dk, dv
        parts = [
            tuple(self._typed(data[kind], torch.float32).clone() for kind in ("dk", "dv"))
            for _, data in self._transfers.read(
                [token_range(a, min(a + self._block, stop)) for a in range(first, stop, self._block)],
                {kind: self._rows[kind] for kind in ("dk", "dv")},
            )
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def zero(self) -> None:
        """Start from gradients of zero everywhere: for windows, whose chunks reach back less than to the beginning."""
        for kind in ("dk", "dv"):
            self._rows[kind].storage.zero_()
        self._low = 0

    def _arrive(self) -> None:
        if self._expected is not None:
            self._expected.settle()
            self._expected = None

    def _allocate(self, k: Tensor) -> None:
        self._heads, self._dtype = (k.shape[1], k.shape[2]), k.dtype
        width = k.shape[1] * k.shape[2]
        for kind, size in (("k", k.dtype.itemsize), ("v", k.dtype.itemsize), ("dk", 4), ("dv", 4)):
            self._rows[kind] = self._allocator.rows(f"keys_values_{kind}", self._place, self.tokens, width * size)

    def _typed(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        return data.view(dtype).view(-1, *self._heads)

    def _write(self, kind: str, first: int, stop: int, data: Tensor) -> None:
        # A chunk may be longer than a block, which is what the staging buffers hold.
        for a in range(first, stop, self._block):
            b = min(a + self._block, stop)
            part = data[a - first : b - first].flatten(1).contiguous().view(torch.uint8)
            self._transfers.write(kind, self._rows[kind], token_range(a, b), part)


class Sink:
    """Where the gradient of one block of keys and values goes: `sums` are what is there already, None before the first."""

    def __init__(self, owner: KeyValues, part: Chunk, sums: tuple[Tensor, ...] | None) -> None:
        self._owner, self._part, self._sums = owner, part, sums

    def add(self, dk: Tensor, dv: Tensor) -> None:
        """Add [keys, K, D] each, or [keys, H, D] of the query heads that share them."""
        owner, part = self._owner, self._part
        for i, (kind, more) in enumerate((("dk", dk), ("dv", dv))):
            heads, base = owner._heads[0], None if self._sums is None else self._sums[i]
            if owner.on_device:
                group_sum(more, heads, base, owner._typed(owner._rows[kind].part(part.start, part.stop), torch.float32))
            else:
                # A sum of its own: what waits to leave the device must not be a buffer that the next block comes into.
                total = more.new_empty(len(more), *owner._heads, dtype=torch.float32)
                owner._write(kind, part.start, part.stop, group_sum(more, heads, base, total))


def token_range(first: int, stop: int) -> Chunk:
    """Tokens `first` … `stop` − 1, as copies take them."""
    return Chunk(first, first, stop, first, (stop - first,), stop - first, shares=True)
