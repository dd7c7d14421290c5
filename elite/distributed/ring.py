"""Exact causal attention over a sequence that ranks share.

Rank r of R holds the tokens of `elite.zigzag`. Its queries stay; keys and values of the others come to it, block by block, and partial
results are merged by their log-sum-exp. The backward takes the merged output and log-sum-exp and goes over the blocks once more; gradients
of keys and values are summed in fp32 (fp64 in fp64) on their way home. Only key/value heads travel, however many query heads share them.

Packed documents need no mask: each rank knows the lengths of all, and attends runs of one document to runs of the same; what no query of
its own sees is not computed.

What is sent and held: elite/distributed/exchange.py.

Source: Liu et al. 2023, arXiv:2310.01889 (ring attention); Brandon et al. 2023, arXiv:2311.09431 (balance); Dao 2023, arXiv:2307.08691
(merging by log-sum-exp).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elite.distributed.exchange import Exchange
from elite.distributed.ranks import Ranks
from elite.errors import ModelError
from elite.executor.streamed.kernels import AttentionShape, Kernel, merge
from elite.optimizations.ring_attention import Variant
from elite.zigzag import Run, runs, share, visible

Documents = tuple[tuple[int, ...], ...]


class Ring(Exchange):
    """Attention between the ranks that share each row.

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
        super().__init__(peers, variant, group)
        self._choose = choose

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


@dataclass(frozen=True)
class _Call:
    """One call of a layer's attention."""

    ring: Ring
    kernel: Kernel
    documents: Documents
    scale: float

    @property
    def sizes(self) -> list[int]:
        """Tokens of a row that each rank holds."""
        return [share(sum(self.documents[0]), rank, self.ring.ranks) for rank in range(self.ring.ranks)]

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
        for owner, block in call.ring.blocks(own, call.sizes):
            for row, queries, keys in call.pairs(owner):
                # No two runs overlap, and so the first pair of a run is this one.
                itself = queries.first == keys.first
                part = _forward(call, q[row, queries.here], block[:, row, keys.here], itself)
                outputs, logs = o[row, queries.here], lse[row, :, queries.here]
                if itself:
                    outputs.copy_(part[0])
                    logs.copy_(part[1])
                else:
                    logs.copy_(merge(outputs, logs, *part, out=outputs)[1])
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

        sums = call.ring.summed(own, call.sizes, over, lse.dtype).to(own.dtype)
        return dq.to(q.dtype), sums[0], sums[1], None


def _forward(call: _Call, q: Tensor, keys_values: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return call.kernel.forward(q, keys_values[0], keys_values[1], causal, None, call.scale)
