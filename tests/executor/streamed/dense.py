"""Attention by the textbook, in fp64 by autograd: what kernels are compared with."""

import torch
from torch import Tensor

NAMES = ("o", "lse", "dq", "dk", "dv")
Four = tuple[Tensor, Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def dense(do: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> Five:
    """o [n, H, D], L [H, n], dq [n, H, D], dk and dv [m, K, D], with the whole [H, n, m] in memory."""
    do, q, k, v = (t.detach().double() for t in (do, q, k, v))
    for t in (q, k, v):
        t.requires_grad_()
    (n, heads, _), (m, kv_heads, _) = q.shape, k.shape
    keys, values = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, keys) * scale
    if causal:
        visible = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        if window is not None:
            visible = visible.triu(m - n - window + 1)
        scores = scores.masked_fill(~visible, -torch.inf)
    o = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    return o.detach(), scores.logsumexp(-1).detach(), dq, dk, dv


def random(n: int, m: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> Four:
    """do, q [n, H, D] and k, v [m, K, D]."""
    generator = torch.Generator().manual_seed(n * 1000 + m)
    sizes = ((n, heads, dim), (n, heads, dim), (m, kv_heads, dim), (m, kv_heads, dim))
    do, q, k, v = (torch.randn(size, generator=generator, dtype=torch.float64).to(device, dtype) for size in sizes)
    return do, q, k, v


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm."""
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
