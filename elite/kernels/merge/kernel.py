"""One pass over both outputs: plain torch makes two, with an fp32 copy between. Formulas are those of `reference.py`."""

from functools import cache
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from elite.kernels.launch import Launch

ROWS = 16
"""Queries of one head that a program merges."""


@triton.jit
def _kernel(
    o_a,
    o_b,
    lse_a,
    lse_b,
    o,
    lse,
    queries,
    a_query,
    a_head,
    b_query,
    b_head,
    out_query,
    out_head,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < queries
    cells = inside[:, None] & (columns < HEAD_DIM)[None, :]
    first = tl.load(lse_a + head * queries + rows, mask=inside, other=0.0)
    second = tl.load(lse_b + head * queries + rows, mask=inside, other=0.0)
    # The larger one's exponential is 1, so nothing overflows.
    top = tl.maximum(first, second)
    share_a, share_b = tl.exp(first - top), tl.exp(second - top)
    total = share_a + share_b
    tl.store(lse + head * queries + rows, top + tl.log(total), mask=inside)
    a = tl.load(o_a + rows[:, None] * a_query + head * a_head + columns[None, :], mask=cells, other=0.0).to(tl.float32)
    b = tl.load(o_b + rows[:, None] * b_query + head * b_head + columns[None, :], mask=cells, other=0.0).to(tl.float32)
    merged = (a * share_a[:, None] + b * share_b[:, None]) / total[:, None]
    target = o + rows[:, None] * out_query + head * out_head + columns[None, :]
    tl.store(target, merged.to(o.dtype.element_ty), mask=cells)


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.merge`, for fp32, bf16 and fp16 with contiguous head dimensions."""
    queries, heads, head_dim = o_a.shape
    o_a, o_b = (t if t.stride(2) == 1 else t.contiguous() for t in (o_a, o_b))
    lse_a, lse_b = lse_a.contiguous(), lse_b.contiguous()
    # A program has read its cells before it writes them.
    o = torch.empty_like(o_a, memory_format=torch.contiguous_format) if out is None else out
    assert o.stride(2) == 1
    lse = torch.empty_like(lse_a)
    numbers = queries, *o_a.stride()[:2], *o_b.stride()[:2], *o.stride()[:2]
    _launch_of(head_dim)((ceil(queries / ROWS), heads), (o_a, o_b, lse_a, lse_b, o, lse), numbers)
    return o, lse


@cache
def _launch_of(head_dim: int) -> Launch:
    return Launch(_kernel, HEAD_DIM=head_dim, COLUMNS=triton.next_power_of_2(head_dim), ROWS=ROWS)
