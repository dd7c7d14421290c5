"""One pass over the heads and the sum: plain torch writes a group's sum before it is added. Formulas are those of `reference.py`."""

from functools import cache
from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from elite.kernels.launch import Launch

VALUES = 8
"""Values of a thread."""


@triton.jit
def _kernel(
    more,
    base,
    out,
    keys,
    more_key,
    more_head,
    base_key,
    base_head,
    out_key,
    out_head,
    HAS_BASE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    # Neighbours in memory go to programs that run at the same time.
    head = tl.program_id(0).to(tl.int64)
    rows = (tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    cells = (rows < keys) & (columns < HEAD_DIM)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if HAS_BASE:
        total += tl.load(base + rows * base_key + head * base_head + columns, mask=cells, other=0.0).to(tl.float32)
    for i in tl.static_range(GROUP):
        part = more + rows * more_key + (head * GROUP + i) * more_head + columns
        total += tl.load(part, mask=cells, other=0.0).to(tl.float32)
    tl.store(out + rows * out_key + head * out_head + columns, total.to(out.dtype.element_ty), mask=cells)


def group_sum(more: Tensor, base: Tensor | None, out: Tensor) -> None:
    """As `reference.group_sum`, for fp32, bf16 and fp16 with contiguous head dimensions."""
    keys, kv_heads, head_dim = out.shape
    more = more if more.stride(2) == 1 else more.contiguous()
    base = base if base is None or base.stride(2) == 1 else base.contiguous()
    assert out.stride(2) == 1
    read = out if base is None else base
    launch = _launch_of(head_dim, more.shape[1] // kv_heads, base is not None)
    numbers = keys, *more.stride()[:2], *read.stride()[:2], *out.stride()[:2]
    launch((kv_heads, ceil(keys / launch.constants["ROWS"])), (more, read, out), numbers)


@cache
def _launch_of(head_dim: int, group: int, has_base: bool) -> Launch:
    return Launch(_kernel, HAS_BASE=has_base, GROUP=group, HEAD_DIM=head_dim, **sizes(head_dim))


@cache
def sizes(head_dim: int) -> dict[str, int]:
    """Columns and keys of a program, and warps, for heads of this width: what is fastest on an H100."""
    columns = triton.next_power_of_2(head_dim)
    rows = 8 if columns > 64 else 32
    return {"COLUMNS": columns, "ROWS": rows, "num_warps": max(1, rows * columns // (32 * VALUES))}
