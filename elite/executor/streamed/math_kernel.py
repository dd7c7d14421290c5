"""What an attention kernel of the streamed executor is, how partial results are merged, and the reference kernel in plain torch.

Every kernel attends n queries to m keys and can go back over any part of the keys, given the output and log-sum-exp over all of them:

    S = scale·q·kᵀ, L = log Σ exp S, P = exp(S − L), o = P·v
    δ = Σ_D do·o, dv = Pᵀ·do, dS = P·(do·vᵀ − δ)·scale, dq = dS·k, dk = dSᵀ·q

so that attention over keys in parts is the parts' outputs merged by L, and its gradient the sum of the parts' gradients.

Shapes: n queries, m keys, H query heads, K key/value heads (H % K == 0), D head dimension; q, o, do, dq [n, H, D];
k, v, dk, dv [m, K, D]; L [H, n]. The G = H / K query heads of a group share one key/value head.

Source: Dao 2023, arXiv:2307.08691; Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionShape:
    """What a kernel is chosen by."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None
    """Keys a query sees, itself included; None for all before it."""


class Kernel(ABC):
    """Attention with its log-sum-exp, forward and backward. See the module's docstring for formulas and shapes."""

    name: ClassVar[str]
    capability: ClassVar[tuple[int, int]] = (0, 0)
    """Least CUDA compute capability."""
    reaches_back: ClassVar[bool] = False
    """Whether one causal call on a chunk and all keys before it costs no more than one for each: nothing is merged, o is rounded once."""

    @abstractmethod
    def supports(self, shape: AttentionShape, device: torch.device) -> str | None:
        """Why this kernel cannot attend such heads on this device, in words; None if it can."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
        """Attend to k and v.

        Args:
            causal: query i sees keys up to i + m − n: aligned bottom-right, m ≥ n.
            window: most keys a causal query sees, itself included.

        Returns:
            o in q's dtype, L (natural logarithm) in fp32; fp64 for fp64 inputs.
        """

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients dq, in q's dtype or wider, dk and dv, in fp32 at least.

        Args:
            o, lse: over all keys a query attends to, of which k and v may be a part.
        """
        dq, dk, dv = self.backward_by_head(do, q, k, v, o, lse, causal, window, scale)
        return dq, group_sum(dk, k.shape[1]), group_sum(dv, v.shape[1])

    @abstractmethod
    def backward_by_head(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `backward`, in q's dtype or wider, and dk and dv [m, H, D] where the kernel leaves a group's sum to the caller."""


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: o [n, H, D] in o_a's dtype and L [H, n], computed in fp32 at least.

    Args:
        out: takes o, of contiguous head dimensions; may be `o_a` itself.
    """
    if o_a.is_cuda and o_a.dtype is not torch.float64:
        from elite.kernels.merge.kernel import merge as merged
    else:
        from elite.kernels.merge.reference import merge as merged
    return merged(o_a, lse_a, o_b, lse_b, out)


def group_sum(more: Tensor, kv_heads: int, base: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Gradients of keys or values [m, H, D] summed over the heads of each group and added to `base` [m, K, D], in `out` or a new tensor.

    Args:
        base: may be `out` itself.
        out: [m, K, D]; of fp32 (fp64 in fp64) where None.
    """
    if out is None:
        wide = torch.promote_types(more.dtype, torch.float32)
        if base is None and more.shape[1] == kv_heads:
            return more.to(wide)
        out = more.new_empty(len(more), kv_heads, more.shape[2], dtype=wide)
    if more.is_cuda and more.dtype is not torch.float64:
        from elite.kernels.group_sum.kernel import group_sum as summed
    else:
        from elite.kernels.group_sum.reference import group_sum as summed
    summed(more, base, out)
    return out


class Math(Kernel):
    """Plain matrix products in fp32 (fp64 for fp64 inputs), tile by tile: the reference, and what a CPU runs.

    Args:
        tile_elements: most scores at once, all heads counted.
    """

    name = "math"

    def __init__(self, tile_elements: int = 2**23) -> None:
        self._tile_elements = tile_elements

    def supports(self, shape: AttentionShape, device: torch.device) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
        (n, heads, dim), m, kv_heads = q.shape, len(k), k.shape[1]
        wide = _wide(q)
        o, lse = q.new_empty(q.shape), q.new_empty(heads, n, dtype=wide)
        high, broad = self._tile(n, heads)
        for rows in _tiles(0, n, high):
            queries = _grouped(q[rows].to(wide), kv_heads)
            # Online softmax: the running maximum, the sum of exponentials and the weighted values, rescaled as the maximum grows.
            top = queries.new_full((*queries.shape[:2], 1), -torch.inf)
            total, values = torch.zeros_like(top), queries.new_zeros(*queries.shape[:2], dim)
            for columns in _seen(rows, n, m, causal, window, broad):
                scores = _scores(queries, k, rows, columns, n, m, causal, window, scale)
                above = torch.maximum(top, scores.amax(-1, keepdim=True))
                # A row that has seen no key yet keeps a sum of zero rather than exp(−∞ + ∞).
                finite = above.clamp(min=torch.finfo(wide).min)
                weights, shrink = (scores - finite).exp_(), (top - finite).exp_()
                total = total * shrink + weights.sum(-1, keepdim=True)
                values = values * shrink + _product(weights, _by_head(v[columns]).to(wide))
                top = above
            o[rows] = _ungrouped(values / total, heads).to(q.dtype)
            lse[:, rows] = (top + total.log()).view(heads, -1)
        return o, lse

    def backward_by_head(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        (n, heads, _), m, kv_heads = q.shape, len(k), k.shape[1]
        wide = _wide(q)
        dq = q.new_empty(q.shape, dtype=wide)
        dk, dv = (t.new_zeros(kv_heads, m, t.shape[2], dtype=wide) for t in (k, v))
        high, broad = self._tile(n, heads)
        for rows in _tiles(0, n, high):
            queries, outward = (_grouped(t[rows].to(wide), kv_heads) for t in (q, do))
            delta = _grouped((do[rows].to(wide) * o[rows].to(wide)).sum(-1, keepdim=True), kv_heads)
            logs = lse[:, rows].to(wide).reshape(kv_heads, -1, 1)
            inward = torch.zeros_like(queries)
            for columns in _seen(rows, n, m, causal, window, broad):
                weights = (_scores(queries, k, rows, columns, n, m, causal, window, scale) - logs).exp_()
                dv[:, columns] += _product(weights.transpose(1, 2), outward)
                slopes = (_product(outward, _by_head(v[columns]).to(wide).transpose(1, 2)) - delta).mul_(weights).mul_(scale)
                inward += _product(slopes, _by_head(k[columns]).to(wide))
                dk[:, columns] += _product(slopes.transpose(1, 2), queries)
            dq[rows] = _ungrouped(inward, heads)
        return dq, dk.transpose(0, 1), dv.transpose(0, 1)

    def _tile(self, n: int, heads: int) -> tuple[int, int]:
        """Queries and keys of a tile: square, or broader where queries are few."""
        high = min(n, max(1, int((self._tile_elements / heads) ** 0.5)))
        return high, max(1, self._tile_elements // (heads * high))


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def _tiles(first: int, stop: int, length: int) -> Iterator[slice]:
    return (slice(start, min(start + length, stop)) for start in range(first, stop, length))


def _seen(rows: slice, n: int, m: int, causal: bool, window: int | None, broad: int) -> Iterator[slice]:
    """Tiles of keys that some query of `rows` sees."""
    shift = m - n
    first = 0 if window is None else max(0, rows.start + shift - window + 1)
    return _tiles(first, min(m, rows.stop + shift) if causal else m, broad)


def _scores(
    queries: Tensor, k: Tensor, rows: slice, columns: slice, n: int, m: int, causal: bool, window: int | None, scale: float
) -> Tensor:
    """Scaled scores [K, G·rows, columns] of `queries` [K, G·rows, D], −∞ where a query does not look."""
    scores = _product(queries, _by_head(k[columns]).to(queries.dtype).transpose(1, 2)) * scale
    if not causal:
        return scores
    here = torch.arange(rows.start, rows.stop, device=k.device)[:, None] + (m - n)
    there = torch.arange(columns.start, columns.stop, device=k.device)
    hidden = there > here
    if window is not None:
        hidden |= there <= here - window
    return scores.masked_fill_(hidden.repeat(queries.shape[1] // len(hidden), 1), -torch.inf)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own dtype, whatever autocast would make of them."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _by_head(t: Tensor) -> Tensor:
    return t.transpose(0, 1)


def _grouped(t: Tensor, kv_heads: int) -> Tensor:
    """[n, H, D] → [K, G·n, D]: the G query heads of a group one after the other, as one matrix against their keys."""
    return t.transpose(0, 1).reshape(kv_heads, -1, t.shape[2])


def _ungrouped(t: Tensor, heads: int) -> Tensor:
    """[K, G·n, D] → [n, H, D]."""
    return t.reshape(heads, -1, t.shape[2]).transpose(0, 1)


MATH = Math()
