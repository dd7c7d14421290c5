"""Blocks of keys and values that go from rank to rank, and the sums of their gradients that come home.

A *block* is [2, …, n, K, D], keys and values of some tokens of one rank; blocks of different ranks may differ in n. In a `ring` each goes
from neighbour to neighbour while the one before is at work, its sums one step behind it; with `all_gather` all come at once, and the sums
are scattered at the end.

Bytes that a rank sends for one block of n tokens (the longest, where ranks' differ, for all_gather), K key/value heads, D head dimension,
B rows, b bytes a value and w of a sum; X = 2·B·n·K·D:

    ring          forward (R − 1)·b·X, backward (R − 1)·b·X + R·w·X
    all_gather    forward (R − 1)·b·X, backward (R − 1)·b·X + (R − 1)·w·X

A ring's device holds two blocks at a time, in the backward besides three of sums (at work, arriving, leaving); all_gather holds R of each.

Source: Liu et al. 2023, arXiv:2310.01889 (ring attention); Dubey et al. 2024, arXiv:2407.21783 §3.3.2 (all-gather of keys and values).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from elite.distributed.ranks import Ranks
from elite.optimizations.ring_attention import Variant

EXCHANGE = "the exchange of keys and values"

Over = Callable[[int, Tensor, Tensor], None]
"""Given whose a block is, the block, and the sums of its gradients: adds this rank's part to them."""


@dataclass
class _Coming:
    """A block on its way."""

    incoming: Tensor
    outgoing: Tensor
    """Must stay as it is until it has been sent."""
    transfers: list[dist.Work]


class Exchange:
    """This process among the R ≥ 2 that share each row. All of them call each method together.

    Args:
        group: all of them, for these transfers alone; None is the default group.
    """

    def __init__(self, peers: Ranks, variant: Variant = Variant.ring, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.ranks, self.variant = peers.rank, peers.world, variant
        self.sent_bytes = 0
        """By this rank so far."""
        self.held_bytes = 0
        """Most that blocks and sums have taken here at once, this rank's own rows aside."""
        self._peers, self._group, self._rehearsing = peers, group, False

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Within, no rank is waited for, and zeros stand for what would come: all is as large and takes as long, but for the way.

        What runs out of memory then leaves nobody waiting.
        """
        self._rehearsing = True
        try:
            yield
        finally:
            self._rehearsing = False

    def blocks(self, own: Tensor, sizes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Every rank's block and whose it is, this one's first; the next comes while one is at work.

        Args:
            own: [2, …, n, K, D].
            sizes: n of each rank's.
        """
        if self.variant is Variant.all_gather:
            everything = self._gathered(own, max(sizes))
            self._hold(everything.nbytes)
            for step in range(self.ranks):
                owner = (self.rank - step) % self.ranks
                yield owner, own if step == 0 else everything[owner].narrow(-3, 0, sizes[owner])
            return
        block = own
        # Whoever calls may be done with it before the last one is here.
        del own
        for step in range(self.ranks):
            last = step == self.ranks - 1
            coming = None if last else self._passed_on(block, sizes[(self.rank - step - 1) % self.ranks])
            self._hold(block.nbytes + (0 if coming is None else coming.incoming.nbytes))
            yield (self.rank - step) % self.ranks, block
            if coming is not None:
                block = self._arrived(coming)

    def summed(self, own: Tensor, sizes: Sequence[int], over: Over, wide: torch.dtype) -> Tensor:
        """All ranks' parts of the gradients of `own` [2, …, n, K, D], added up in `wide`."""
        if self.variant is Variant.all_gather:
            everything = own.new_zeros(self.ranks, *_resized(own, max(sizes)), dtype=wide)
            self._hold(everything.nbytes + everything.nbytes // wide.itemsize * own.dtype.itemsize)
            for owner, block in self.blocks(own, sizes):
                over(owner, block, everything[owner].narrow(-3, 0, sizes[owner]))
            return self._scattered(everything).narrow(-3, 0, own.shape[-3])
        arriving, coming = None, self.blocks(own, sizes)
        del own
        for owner, block in coming:
            sums = torch.zeros_like(block, dtype=wide)
            over(owner, block, sums)
            if arriving is not None:
                sums += self._arrived(arriving)
            # One step behind its block, and home with the last one. The one that has arrived is freed with the next.
            self._hold(2 * block.nbytes + 3 * sums.nbytes)
            arriving = self._passed_on(sums, sizes[(owner - 1) % self.ranks])
        assert arriving is not None
        return self._arrived(arriving)

    def _hold(self, size: int) -> None:
        self.held_bytes = max(self.held_bytes, size)

    def _passed_on(self, outgoing: Tensor, size: int) -> _Coming:
        """Hand a block on to the next rank, and take one of so many tokens from the rank before."""
        if self._rehearsing:
            return _Coming(outgoing.new_zeros(_resized(outgoing, size)), outgoing, [])
        incoming = outgoing.new_empty(_resized(outgoing, size))
        after, before = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        transfers = [dist.P2POp(dist.isend, outgoing, after, self._group), dist.P2POp(dist.irecv, incoming, before, self._group)]
        self.sent_bytes += outgoing.nbytes
        with self._peers.meeting(EXCHANGE):
            return _Coming(incoming, outgoing, dist.batch_isend_irecv(transfers))

    def _arrived(self, coming: _Coming) -> Tensor:
        """The block, once it is there and what was sent is gone."""
        with self._peers.meeting(EXCHANGE):
            for transfer in coming.transfers:
                transfer.wait()
        return coming.incoming

    def _gathered(self, own: Tensor, longest: int) -> Tensor:
        """Every rank's block [R, 2, …, longest, K, D]; what is beyond a rank's tokens is not to be read."""
        mine = own if own.shape[-3] == longest else own.new_zeros(_resized(own, longest))
        if mine is not own:
            mine.narrow(-3, 0, own.shape[-3]).copy_(own)
        if self._rehearsing:
            return own.new_zeros(self.ranks, *mine.shape)
        everything = own.new_empty(self.ranks, *mine.shape)
        with self._peers.meeting(EXCHANGE):
            dist.all_gather_into_tensor(everything.flatten(0, 1), mine, self._group)
        self.sent_bytes += (self.ranks - 1) * mine.nbytes
        return everything

    def _scattered(self, everything: Tensor) -> Tensor:
        """The sum of all ranks' [R, …] for this one."""
        mine = torch.empty_like(everything[0])
        if self._rehearsing:
            return mine.copy_(everything[self.rank])
        with self._peers.meeting(EXCHANGE):
            dist.reduce_scatter_tensor(mine, everything.flatten(0, 1), group=self._group)
        self.sent_bytes += (self.ranks - 1) * mine.nbytes
        return mine


def _resized(block: Tensor, tokens: int) -> tuple[int, ...]:
    """The shape of a block of so many tokens."""
    return (*block.shape[:-3], tokens, *block.shape[-2:])
