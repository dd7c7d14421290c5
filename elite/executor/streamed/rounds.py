"""A layer's attention where ranks share the sequence: blocks of keys and values come from rank to rank, and chunk by chunk is attended.

A rank knows a layer's keys and values only once all of its chunks are projected, and those of the others come a block at a time. So a
layer goes over its chunks in parts, and ranks meet between them:

    forward     project     each chunk's queries, keys and values
                · ranks meet: O and log-sum-exp of each chunk, merged block by block
                finish      the rest of the layer with that output
    backward    (project and · once more, where O and log-sum-exp are not kept)
                above       from the layer's output down to dO; queries, keys and values again on the way
                · ranks meet: dQ, block by block; sums of dK and dV travel with their block, and come home
                below       from dQ, dK and dV through the projections to the layer's input

They meet in *laps*: in each, a block of every rank passes by, at most `block` keys of its early and its late tokens alike
(`elite.zigzag.Dealing`). Chunks wait as rows meanwhile, and are brought and taken once for each block that they see:

    q, do [tokens, H, D] in the compute dtype, o, dq and lse [tokens, H] in fp32    with the boundaries; on the host if those are on disk
    k, v [tokens, K, D] in the compute dtype, whose places dk and dv take           where keys and values are

So nothing that grows with the context is whole on any rank. The price is one more projection of each chunk, forward and backward.

Source: Liu et al. 2023, arXiv:2310.01889; Dao 2023, arXiv:2307.08691.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elite.chunks import Chunk, Group, cut, slices
from elite.distributed.exchange import Exchange
from elite.errors import ModelError
from elite.executor.streamed.attention import Work
from elite.executor.streamed.kernels import AttentionShape, Kernel, group_sum, merge
from elite.executor.streamed.keys_values import token_range
from elite.executor.streamed.rows import Allocator, Rows
from elite.executor.streamed.transfers import Fields, Transfers
from elite.streaming import Place, Streaming
from elite.zigzag import Dealing, Seen, seen, share


@dataclass(frozen=True)
class Shared:
    """How ranks share the rows of a step."""

    exchange: Exchange
    dealing: Dealing


@dataclass(frozen=True)
class Outputs:
    """Where attended outputs wait."""

    rows: Fields
    decode: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]
    """O [n, H, D] in the compute dtype and its log-sum-exp [H, n] of rows that have been read."""


@dataclass(frozen=True)
class _Kind:
    """What rows of a kind hold: [tokens, *shape]."""

    place: Place
    shape: tuple[int, ...]
    dtype: torch.dtype


class Rounds:
    """See the module's docstring.

    Args:
        transfers: of the step, with nothing asked for ahead while ranks meet.
        choose: the kernel for a shape of attention.
        beat: told before each block.
    """

    def __init__(
        self,
        layout: Streaming,
        allocator: Allocator,
        transfers: Transfers,
        device: torch.device,
        choose: Callable[[AttentionShape], Kernel],
        beat: Callable[[str], object],
    ) -> None:
        self._layout, self._allocator, self._transfers, self._device = layout, allocator, transfers, device
        self._choose, self._beat = choose, beat
        self._kinds: dict[str, _Kind] = {}
        self._shared: Shared
        self._kernel: Kernel
        self._scale = 1.0
        self.holds: int | None = None
        """The layer whose attended queries, keys, values and outputs these are."""

    def begin(self, shared: Shared) -> None:
        """Take up a step's rows."""
        self._shared = shared
        self.holds = None

    def put(self, chunk: Chunk, work: Work) -> None:
        """Keep what a layer has projected of a chunk."""
        assert work.projected is not None
        q, k, v = work.projected
        self._kinds = self._of(q, k)
        self._kernel = self._choose(AttentionShape(q.shape[1], k.shape[1], q.shape[2], q.dtype))
        self._scale = work.scale
        for kind, tensor in (("q", q), ("k", k), ("v", v)):
            self._write(kind, chunk, tensor)

    def put_gradient(self, chunk: Chunk, do: Tensor) -> None:
        """Keep the gradient of a chunk's attended output [n, H, D]."""
        self._write("do", chunk, do)

    def attend(self, layer: int, chunks: Sequence[Chunk]) -> None:
        """Outputs of this rank's chunks, once all are projected. All ranks meet here."""
        dealing, first = self._shared.dealing, True
        for lap in range(dealing.laps):
            for owner, block in self._shared.exchange.blocks(self._block(lap), dealing.sizes(lap)):
                self._beat(f"keys of rank {owner} in layer {layer}")
                self._attend_block(lap, owner, block, chunks, first)
                first = False
        self.holds = layer

    def descend(self, layer: int, chunks: Sequence[Chunk], outputs: Outputs) -> None:
        """Gradients of queries, keys and values, once those of this rank's chunks' outputs are known. All ranks meet here."""
        self.holds = None
        dealing, first = self._shared.dealing, True
        wide = self._kinds["dq"].dtype
        for lap in range(dealing.laps):

            def over(owner: int, block: Tensor, sums: Tensor, lap: int = lap) -> None:
                nonlocal first
                self._beat(f"gradients of rank {owner}'s keys in layer {layer}")
                self._descend_block(lap, owner, block, sums, chunks, outputs, first)
                first = False

            sums = self._shared.exchange.summed(self._block(lap), dealing.sizes(lap), over, wide)
            # Every rank has been over this block: nobody reads its keys and values any more.
            at = 0
            for part in dealing.parts(self._shared.exchange.rank, lap):
                length = part.stop - part.start
                for kind, of_kind in zip(("k", "v"), sums, strict=True):
                    self._write(kind, token_range(part.start, part.stop), of_kind[at : at + length].to(self._kinds[kind].dtype))
                at += length

    @property
    def outputs(self) -> Outputs:
        """Of the last `attend`."""

        def decode(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            # Copies: what is kept leaves the device, and must not be a buffer that the next chunk comes into.
            o = self._typed("o", data).to(self._kinds["q"].dtype, copy=True)
            return o, self._typed("lse", data).t().clone(memory_format=torch.contiguous_format)

        return Outputs({kind: self._rows(kind) for kind in ("o", "lse")}, decode)

    @property
    def gradients(self) -> Fields:
        """Rows of the last `descend`."""
        return {"dq": self._rows("dq"), "dk": self._rows("k"), "dv": self._rows("v")}

    def gradients_of(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """dQ [n, H, D], dK and dV [n, K, D] in the compute dtype of rows that have been read."""
        of_keys = (data[kind].view(self._kinds["k"].dtype).unflatten(1, self._kinds["k"].shape) for kind in ("dk", "dv"))
        dk, dv = of_keys
        return self._typed("dq", data).to(self._kinds["q"].dtype), dk, dv

    def _attend_block(self, lap: int, owner: int, block: Tensor, chunks: Sequence[Chunk], first: bool) -> None:
        """Merge a block's part into the outputs of the chunks that see it; the first one begins the outputs of all."""
        for chunk, data, pairs in self._seeing(lap, owner, chunks, self._fields(("q",), ("o", "lse"), first), first):
            q, o = self._typed("q", data), self._sum("o", data, first, 0.0)
            lse = self._sum("lse", data, first, -torch.inf)
            logs = lse.t().contiguous()
            for pair in pairs:
                part = self._kernel.forward(q[pair.queries], block[0, pair.keys], block[1, pair.keys], pair.causal, None, self._scale)
                here = o[pair.queries]
                logs[:, pair.queries] = merge(here, logs[:, pair.queries], *part, out=here)[1]
            self._keep("o", chunk, o)
            self._keep("lse", chunk, lse.copy_(logs.t()))

    def _descend_block(
        self, lap: int, owner: int, block: Tensor, sums: Tensor, chunks: Sequence[Chunk], outputs: Outputs, first: bool
    ) -> None:
        """Add a block's part to dQ of the chunks that see it, and theirs to its own `sums`; the first one begins dQ of all."""
        fields = self._fields(("q", "do"), ("dq",), first) | outputs.rows
        for chunk, data, pairs in self._seeing(lap, owner, chunks, fields, first):
            q, do, (o, lse) = self._typed("q", data), self._typed("do", data), outputs.decode(data)
            dq = self._sum("dq", data, first, 0.0)
            for pair in pairs:
                here, keys = pair.queries, (block[0, pair.keys], block[1, pair.keys])
                of_queries = o[here], lse[:, here].contiguous()
                parts = self._kernel.backward_by_head(do[here], q[here], *keys, *of_queries, pair.causal, None, self._scale)
                dq[here] += parts[0]
                for total, part in zip(sums[:, pair.keys], parts[1:], strict=True):
                    group_sum(part, total.shape[1], total, total)
                del parts
            self._keep("dq", chunk, dq)

    def _seeing(
        self, lap: int, owner: int, chunks: Sequence[Chunk], fields: Fields, every: bool
    ) -> Iterator[tuple[Chunk, dict[str, Tensor], tuple[Seen, ...]]]:
        """Chunks that see a block, or every one, each with its rows and with what it sees."""
        rank, dealing = self._shared.exchange.rank, self._shared.dealing
        pairs = {chunk: seen(dealing, rank, chunk.start, chunk.stop, owner, lap) for chunk in chunks}
        for chunk, data in self._transfers.read([chunk for chunk in chunks if every or pairs[chunk]], fields):
            yield chunk, data, pairs[chunk]

    def _block(self, lap: int) -> Tensor:
        """This rank's block [2, b, K, D] of a lap."""
        rank, dealing, kind = self._shared.exchange.rank, self._shared.dealing, self._kinds["k"]
        block = torch.empty(2, dealing.sizes(lap)[rank], *kind.shape, dtype=kind.dtype, device=self._device)
        for name, of_kind in zip(("k", "v"), block, strict=True):
            at = 0
            for part in dealing.parts(rank, lap):
                target = of_kind[at : at + part.stop - part.start].flatten(1).view(torch.uint8)
                self._transfers.copy_in(target, self._rows(name), token_range(part.start, part.stop))
                at += len(target)
        self._transfers.settle()
        return block

    def _of(self, q: Tensor, k: Tensor) -> dict[str, _Kind]:
        """All kinds of rows, where a layer projects to such queries and keys."""
        layout, wide = self._layout, torch.promote_types(q.dtype, torch.float32)
        near = Place.host if layout.boundaries is Place.disk else layout.boundaries
        queries, keys = tuple(q.shape[1:]), tuple(k.shape[1:])
        found = {kind: _Kind(near, queries, q.dtype) for kind in ("q", "do")} | {kind: _Kind(near, queries, wide) for kind in ("o", "dq")}
        found["lse"] = _Kind(near, queries[:1], wide)
        return found | {kind: _Kind(layout.keys_values, keys, k.dtype) for kind in ("k", "v")}

    def _rows(self, kind: str) -> Rows:
        of, rank = self._kinds[kind], self._shared.exchange.rank
        return self._allocator.rows(f"shared_{kind}", of.place, self._shared.dealing.tokens(rank), math.prod(of.shape) * of.dtype.itemsize)

    def _fields(self, kinds: tuple[str, ...], sums: tuple[str, ...], first: bool) -> Fields:
        """What a pass over the chunks reads; of sums, before there are any, only places that they are worked out at."""
        return {kind: self._rows(kind) for kind in (*kinds, *(kind for kind in sums if not first or self._is_near(kind)))}

    def _sum(self, kind: str, data: dict[str, Tensor], first: bool, start: float) -> Tensor:
        """A chunk's sum so far, to be added to: where it lies on the device itself, elsewhere what `_keep` is to take there."""
        if first and not self._is_near(kind):
            of = self._kinds[kind]
            return torch.full((len(next(iter(data.values()))), *of.shape), start, dtype=of.dtype, device=self._device)
        there = self._typed(kind, data)
        if first:
            return there.fill_(start)
        # What leaves must not be a buffer that the next chunk comes into.
        return there if self._is_near(kind) else there.clone()

    def _keep(self, kind: str, chunk: Chunk, total: Tensor) -> None:
        """A sum that has been added to."""
        if not self._is_near(kind):
            self._write(kind, chunk, total)

    def _is_near(self, kind: str) -> bool:
        return self._kinds[kind].place is Place.device

    def _typed(self, kind: str, data: dict[str, Tensor]) -> Tensor:
        of = self._kinds[kind]
        return data[kind].view(of.dtype).unflatten(1, of.shape)

    def _write(self, kind: str, chunk: Chunk, tensor: Tensor) -> None:
        self._transfers.write(kind, self._rows(kind), chunk, tensor.flatten(1).contiguous().view(torch.uint8))


def cut_rows(
    layout: Streaming, documents: Sequence[Sequence[int]], length: int, exchange: Exchange | None
) -> tuple[tuple[Group, ...], Shared | None]:
    """Chunks of rows of so many tokens, and how the rows are shared.

    Args:
        documents: of whole rows.
        exchange: of the ranks that hold parts of them; None: this one has all.

    Raises:
        ModelError: documents do not fill the rows.
    """
    lengths = [sum(row) if exchange is None else share(sum(row), exchange.rank, exchange.ranks) for row in documents]
    for i, found in enumerate(lengths):
        if found != length:
            raise ModelError(f"the documents of row {i} have {found} tokens, the row {length}", "documents= that fill their rows")
    if exchange is None:
        return cut([n for row in documents for n in row], layout.chunk), None
    longest = max(n for row in documents for n in row)
    most = max(share(sum(documents[0]), rank, exchange.ranks) for rank in range(exchange.ranks))
    dealing = Dealing(tuple(map(tuple, documents)), exchange.ranks, laps=-(-len(documents) * most // layout.block))
    groups = slices(len(documents) * length, longest, layout.chunk, lambda token: dealing.position(exchange.rank, token))
    return groups, Shared(exchange, dealing)
