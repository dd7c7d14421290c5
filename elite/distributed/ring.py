"""Exact causal attention over a sequence that ranks share.

Rank r of R holds the tokens of `elite.zigzag`. Its queries stay; keys and values of the others come to it, block by block, and partial
results are merged by their log-sum-exp. The backward takes the merged output and log-sum-exp and goes over the blocks once more; gradients
of keys and values are summed in fp32 (fp64 in fp64) on their way home. Only key/value heads travel, however many query heads share them.

Packed documents need no mask: each rank knows the lengths of all, and attends runs of one document to runs of the same; what no query of
its own sees is not computed.

Bytes that a rank sends for one layer, with n tokens a rank (the longest, where they differ, for all_gather), B rows, K key/value heads,
D head dimension, b bytes a value and w of a sum (4; 8 in fp64); X = 2·B·n·K·D:

    ring          forward (R − 1)·b·X, backward (R − 1)·b·X + R·w·X
    all_gather    forward (R − 1)·b·X, backward (R − 1)·b·X + (R − 1)·w·X

A ring's device holds two blocks at a time, in the backward besides two of sums; all_gather holds R of each.

Source: Liu et al. 2023, arXiv:2310.01889 (ring attention); Brandon et al. 2023, arXiv:2311.09431 (balance); Dubey et al. 2024,
arXiv:2407.21783 §3.3.2 (all-gather of keys and values); Dao 2023, arXiv:2307.08691 (merging by log-sum-exp).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elite.distributed.ranks import Ranks
from elite.errors import ModelError
from elite.executor.streamed.kernels import AttentionShape, Kernel, merge
from elite.optimizations.ring_attention import Variant
from elite.zigzag import Run, runs, share, visible

Documents = tuple[tuple[int, ...], ...]
EXCHANGE = "the exchange of keys and values"


class Ring:
    """This process among the R ≥ 2 that share each row.

    Args:
        choose: the kernel for a shape of attention.
        group: all of them, for these transfers alone; None is the default group.
    """

    def __init__(
        self,
        peers: Ranks,
        choose: Callable[[AttentionShape], Kernel],
        variant: Variant = Variant.ring,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.ranks, self.variant = peers.rank, peers.world, variant
        self.sent_bytes = 0
        """By this rank so far."""
        self._peers, self._choose, self._group = peers, choose, group

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, dropout: float, window: int | None
    ) -> Tensor:
        """Attention of this rank's queries to all keys before them in their documents, on whichever rank. All ranks call it together.

        Args:
            query: [B, H, n, D] of the n tokens that this rank holds.
            key, value: [B, K, n, D], H % K == 0.
            documents: lengths of each whole row's documents; each row sums to the same length.
            scaling: of the scores; None is D^-½.
            window: tokens that a query sees; it must reach over the longest document.

        Returns:
            [B, H, n, D], in autocast's dtype where it is on.

        Raises:
            ModelError: dropout of attention weights, or a window within a document.
        """
        if dropout:
            raise ModelError("attention weights are dropped out, which ranks that share a sequence cannot", "attention_dropout=0")
        if window is not None and window < max(max(row) for row in documents):
            raise ModelError(
                f"a window of {window:,} tokens within a longer document, which ranks that share a sequence do not attend",
                "optimizations.ring_attention.enabled=false",
            )
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
        q, k, v = (t.to(dtype).transpose(1, 2) for t in (query, key, value))
        kernel = self._choose(AttentionShape(q.shape[2], k.shape[2], q.shape[3], dtype))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out: Tensor = _RingAttention.apply(q, k, v, _Call(self, kernel, documents, scale))
        return out.transpose(1, 2)

    def longest(self, length: int) -> int:
        """Most tokens that any rank holds of a row of so many."""
        return max(share(length, rank, self.ranks) for rank in range(self.ranks))

    def blocks(self, own: Tensor, length: int) -> Iterator[tuple[int, Tensor]]:
        """Every rank's keys and values [2, B, n, K, D] and whose they are, this one's first; the next comes while one is at work."""
        if self.variant is Variant.all_gather:
            everything = self._gathered(own, self.longest(length))
            for step in range(self.ranks):
                owner = (self.rank - step) % self.ranks
                yield owner, own if step == 0 else everything[owner, :, :, : share(length, owner, self.ranks)]
            return
        block = own
        for step in range(self.ranks):
            last = step == self.ranks - 1
            coming = None if last else self.exchange(block, (self.rank - step - 1) % self.ranks, length)
            yield (self.rank - step) % self.ranks, block
            if coming is not None:
                block = self.arrived(coming)

    def exchange(self, outgoing: Tensor, owner: int, length: int) -> "Coming":
        """Hand a block on to the next rank, and take what belongs to `owner` from the one before."""
        incoming = outgoing.new_empty(*outgoing.shape[:2], share(length, owner, self.ranks), *outgoing.shape[3:])
        after, before = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        transfers = [dist.P2POp(dist.isend, outgoing, after, self._group), dist.P2POp(dist.irecv, incoming, before, self._group)]
        self.sent_bytes += outgoing.nbytes
        with self._peers.meeting(EXCHANGE):
            return Coming(incoming, outgoing, dist.batch_isend_irecv(transfers))

    def arrived(self, coming: "Coming") -> Tensor:
        """The block, once it is there and what was sent is gone."""
        with self._peers.meeting(EXCHANGE):
            for transfer in coming.transfers:
                transfer.wait()
        return coming.incoming

    def _gathered(self, own: Tensor, longest: int) -> Tensor:
        """Every rank's block [R, 2, B, longest, K, D]; what is beyond a rank's tokens is not to be read."""
        everything = own.new_empty(self.ranks, *own.shape[:2], longest, *own.shape[3:])
        mine = _lengthened(own, longest)
        with self._peers.meeting(EXCHANGE):
            dist.all_gather_into_tensor(everything.flatten(0, 1), mine, self._group)
        self.sent_bytes += (self.ranks - 1) * mine.nbytes
        return everything

    def reduce_scattered(self, everything: Tensor) -> Tensor:
        """The sum of all ranks' [R, …] for this one."""
        mine = torch.empty_like(everything[0])
        with self._peers.meeting(EXCHANGE):
            dist.reduce_scatter_tensor(mine, everything.flatten(0, 1), group=self._group)
        self.sent_bytes += (self.ranks - 1) * mine.nbytes
        return mine


@dataclass
class Coming:
    """A block on its way."""

    incoming: Tensor
    outgoing: Tensor
    """Must stay as it is until it has been sent."""
    transfers: list[dist.Work]


@dataclass(frozen=True)
class _Call:
    """One call of a layer's attention."""

    ring: Ring
    kernel: Kernel
    documents: Documents
    scale: float

    @property
    def length(self) -> int:
        """Tokens of a whole row."""
        return sum(self.documents[0])

    def pairs(self, owner: int) -> Iterator[tuple[int, Run, Run]]:
        """Row, run of this rank's queries and run of the owner's keys that they see."""
        for row, documents in enumerate(self.documents):
            mine, theirs = (runs(documents, rank, self.ring.ranks) for rank in (self.ring.rank, owner))
            yield from ((row, q, k) for q, k in visible(mine, theirs))


class _RingAttention(torch.autograd.Function):
    """q [B, n, H, D], k and v [B, n, K, D] → [B, n, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        own = torch.stack((k, v))
        # Many parts: wide until the last one is there, so that what is merged is rounded once.
        wide = torch.promote_types(q.dtype, torch.float32)
        o = torch.empty(q.shape, dtype=wide, device=q.device)
        lse = torch.empty(len(q), q.shape[2], q.shape[1], dtype=wide, device=q.device)
        for owner, block in call.ring.blocks(own, call.length):
            for row, queries, keys in call.pairs(owner):
                # No two runs overlap, and so the first pair of a run is this one.
                itself = queries.first == keys.first
                part = _forward(call, q[row, queries.here], block[:, row, keys.here], itself)
                there = o[row, queries.here], lse[row, :, queries.here]
                made = part if itself else merge(*there, *part)
                there[0].copy_(made[0])
                there[1].copy_(made[1])
        out = o.to(q.dtype)
        ctx.save_for_backward(q, own, out, lse)
        ctx.call = call
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        q, own, out, lse = ctx.saved_tensors
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)

        def over(owner: int, block: Tensor, sums: Tensor) -> None:
            """Add one block's part to dq and to the sums [2, B, n, K, D] of its own gradients."""
            for row, queries, keys in call.pairs(owner):
                here, there = queries.here, keys.here
                k, v = block[:, row, there]
                of_queries = out[row, here], lse[row, :, here].contiguous()
                parts = call.kernel.backward(do[row, here], q[row, here], k, v, *of_queries, queries.first == keys.first, None, call.scale)
                dq[row, here] += parts[0]
                sums[0, row, there] += parts[1]
                sums[1, row, there] += parts[2]

        ahead = _around if call.ring.variant is Variant.ring else _at_once
        sums = ahead(call, own, over, lse.dtype).to(own.dtype)
        return dq.to(q.dtype), sums[0], sums[1], None


Over = Callable[[int, Tensor, Tensor], None]


def _around(call: _Call, own: Tensor, over: Over, wide: torch.dtype) -> Tensor:
    """Sums travel one step behind their block and come home with the last one."""
    ring = call.ring
    arriving: Coming | None = None
    for owner, block in ring.blocks(own, call.length):
        sums = torch.zeros_like(block, dtype=wide)
        over(owner, block, sums)
        if arriving is not None:
            sums += ring.arrived(arriving)
        arriving = ring.exchange(sums, (owner - 1) % ring.ranks, call.length)
    assert arriving is not None
    return ring.arrived(arriving)


def _at_once(call: _Call, own: Tensor, over: Over, wide: torch.dtype) -> Tensor:
    ring = call.ring
    everything = own.new_zeros(ring.ranks, *own.shape[:2], ring.longest(call.length), *own.shape[3:], dtype=wide)
    for owner, block in ring.blocks(own, call.length):
        over(owner, block, everything[owner, :, :, : block.shape[2]])
    return ring.reduce_scattered(everything)[:, :, : own.shape[2]]


def _forward(call: _Call, q: Tensor, keys_values: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return call.kernel.forward(q, keys_values[0], keys_values[1], causal, None, call.scale)


def _lengthened(own: Tensor, longest: int) -> Tensor:
    """[2, B, n, K, D] with `longest` tokens."""
    if own.shape[2] == longest:
        return own
    longer = own.new_zeros(*own.shape[:2], longest, *own.shape[3:])
    longer[:, :, : own.shape[2]] = own
    return longer
