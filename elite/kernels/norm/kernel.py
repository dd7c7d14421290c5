"""A row a program: read once, written once; the backward keeps h and two numbers a row. Formulas are those of `reference.py`.

With g = dy w, the mean over the width written ⟨·⟩ and s = 1 / sqrt(σ² + ε):

    dh = s (g − ⟨g⟩ − x̂ ⟨g x̂⟩) + what arrives at h itself        dw = Σ_rows dy x̂        db = Σ_rows dy

⟨g⟩ is left out without centring. Where weights train, a program goes over several rows and keeps their sums.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_WIDTH = 2**16
"""Values of a row that one program may hold."""
PROGRAMS = 256
"""Partial sums of the weights' gradients."""


@triton.jit
def _forward(
    x, residual, weight, bias, y, h, mean, scale, width, eps,
    CENTER: tl.constexpr, ADDS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(residual + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        # As the backward will read it.
        rounded = values.to(h.dtype.element_ty)
        tl.store(h + row * width + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    if CENTER:
        middle = tl.sum(values, 0) / width
        tl.store(mean + row, middle)
        values = tl.where(inside, values - middle, 0.0)
    s = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(scale + row, s)
    out = values * s * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + columns, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, dh, h, weight, mean, scale, dx, dw, db, rows, rows_each, width,
    CENTER: tl.constexpr, ADDS: tl.constexpr, TRAINS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * rows_each
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    total_w = tl.zeros((BLOCK,), tl.float32)
    total_b = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + rows_each, rows)):
        upstream = tl.load(dy + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(h + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(scale + row)
        if CENTER:
            values = tl.where(inside, values - tl.load(mean + row), 0.0)
        values *= s
        slope = upstream * w
        out = slope - values * (tl.sum(slope * values, 0) / width)
        if CENTER:
            out -= tl.sum(slope, 0) / width
        out *= s
        if ADDS:
            out += tl.load(dh + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * width + columns, out.to(dx.dtype.element_ty), mask=inside)
        if TRAINS:
            total_w += upstream * values
            if HAS_BIAS:
                total_b += upstream
    if TRAINS:
        part = tl.program_id(0).to(tl.int64) * width + columns
        tl.store(dw + part, total_w, mask=inside)
        if HAS_BIAS:
            tl.store(db + part, total_b, mask=inside)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool
    ) -> tuple[Tensor, Tensor | None]:
        rows = x.contiguous().view(-1, x.shape[-1])
        added = None if residual is None else residual.contiguous().view_as(rows)
        y, h = torch.empty_like(rows), rows if added is None else torch.empty_like(rows)
        scale = torch.empty(len(rows), dtype=torch.float32, device=x.device)
        mean = torch.empty_like(scale) if center else scale
        if rows.numel():
            _forward[(len(rows),)](
                *(rows, rows if added is None else added, weight, weight if bias is None else bias, y, h, mean, scale),
                *(rows.shape[1], eps),
                CENTER=center,
                ADDS=added is not None,
                HAS_BIAS=bias is not None,
                **_sizes(rows.shape[1]),
            )
        ctx.save_for_backward(h, weight, bias, mean, scale)
        ctx.center, ctx.adds = center, added is not None
        ctx.set_materialize_grads(False)
        return y.view_as(x), None if added is None else h.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        h, weight, bias, mean, scale = ctx.saved_tensors
        dy, dh = (None if g is None else g.contiguous().view_as(h) for g in upstream)
        shape = next(g.shape for g in upstream if g is not None)
        if dy is None:
            assert dh is not None
            return dh.view(shape), dh.view(shape) if ctx.adds else None, None, None, None, None
        trains = any(ctx.needs_input_grad[2:4])
        each = max(1, triton.cdiv(len(h), PROGRAMS)) if trains else 1
        programs, dx = triton.cdiv(len(h), each), torch.empty_like(h)
        dw = torch.zeros(programs if trains else 0, h.shape[1], dtype=torch.float32, device=h.device)
        db = torch.zeros_like(dw) if bias is not None else dw
        if h.numel():
            _backward[(programs,)](
                *(dy, dy if dh is None else dh, h, weight, mean, scale, dx, dw, db, len(h), each, h.shape[1]),
                CENTER=ctx.center,
                ADDS=dh is not None,
                TRAINS=trains,
                HAS_BIAS=bias is not None,
                **_sizes(h.shape[1]),
            )
        grad_w = dw.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        grad_b = db.sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[3] else None
        return dx.view(shape), dx.view(shape) if ctx.adds else None, grad_w, grad_b, None, None


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, center: bool, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference.norm`, with fp32 sums, for fp32, bf16 and fp16.

    Raises:
        ValueError: rows are wider than a program can hold.
    """
    if x.shape[-1] > MOST_WIDTH:
        raise ValueError(f"norm over {x.shape[-1]:,} values: the kernel holds at most {MOST_WIDTH:,}")
    y, h = _Norm.apply(x, residual, weight, bias, eps, center)
    return y, x if residual is None else h


def _sizes(width: int) -> dict[str, int]:
    """Block and warps for rows of this width: about 16 values a thread."""
    block = triton.next_power_of_2(max(width, 1))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
