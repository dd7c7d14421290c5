"""Some rows a program, each read once and written once; the backward keeps h and two numbers a row. Formulas are those of `reference.py`.

With g = dy w, the mean over the width written ⟨·⟩ and s = 1 / sqrt(σ² + ε):

    dh = s (g − ⟨g⟩ − x̂ ⟨g x̂⟩) + what arrives at h itself        dw = Σ_rows dy x̂        db = Σ_rows dy

⟨g⟩ is left out without centring. Where weights train, a program goes over several tiles of rows and keeps their sums.
"""

from functools import cache
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from elite.kernels.launch import Launch

MOST_WIDTH = 2**16
"""Values of a row that one program may hold."""
PROGRAMS = 1024
"""Partial sums of the weights' gradients, at most."""
TILE = 4096
"""Values of a program, where rows are narrower than this; without weights that train, the backward takes a row at a time."""
FORWARD_VALUES, BACKWARD_VALUES = 32, 16
"""Values of a thread: the backward holds twice as many tensors of them."""


@triton.jit
def _forward(
    x, residual, weight, bias, y, h, mean, scale, rows, width, eps,
    CENTER: tl.constexpr, ADDS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    here, across = row < rows, columns < width
    inside = here[:, None] & across
    cells = row[:, None] * width + columns
    values = tl.load(x + cells, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(residual + cells, mask=inside, other=0.0).to(tl.float32)
        # As the backward will read it.
        rounded = values.to(h.dtype.element_ty)
        tl.store(h + cells, rounded, mask=inside)
        values = rounded.to(tl.float32)
    if CENTER:
        middle = tl.sum(values, 1) / width
        tl.store(mean + row, middle, mask=here)
        values = tl.where(across, values - middle[:, None], 0.0)
    s = 1.0 / tl.sqrt(tl.sum(values * values, 1) / width + eps)
    tl.store(scale + row, s, mask=here)
    out = values * s[:, None] * tl.load(weight + columns, mask=across, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + columns, mask=across, other=0.0).to(tl.float32)
    tl.store(y + cells, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy, dh, h, weight, mean, scale, dx, dw, db, rows, tiles_each, width,
    CENTER: tl.constexpr, ADDS: tl.constexpr, TRAINS: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)[None, :]
    across = columns < width
    w = tl.load(weight + columns, mask=across, other=0.0).to(tl.float32)
    total_w = tl.zeros((ROWS, BLOCK), tl.float32)
    total_b = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles_each * ROWS
    for tile in range(0, tiles_each):
        row = first + tile * ROWS + tl.arange(0, ROWS)
        here = row < rows
        inside = here[:, None] & across
        cells = row[:, None] * width + columns
        upstream = tl.load(dy + cells, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(h + cells, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(scale + row, mask=here, other=0.0)[:, None]
        if CENTER:
            values = tl.where(across, values - tl.load(mean + row, mask=here, other=0.0)[:, None], 0.0)
        values *= s
        slope = upstream * w
        out = slope - values * (tl.sum(slope * values, 1) / width)[:, None]
        if CENTER:
            out -= (tl.sum(slope, 1) / width)[:, None]
        out *= s
        if ADDS:
            out += tl.load(dh + cells, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + cells, out.to(dx.dtype.element_ty), mask=inside)
        if TRAINS:
            total_w += upstream * values
            if HAS_BIAS:
                total_b += upstream
    if TRAINS:
        part = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
        tl.store(dw + part, tl.sum(total_w, 0), mask=tl.arange(0, BLOCK) < width)
        if HAS_BIAS:
            tl.store(db + part, tl.sum(total_b, 0), mask=tl.arange(0, BLOCK) < width)


class _Norm(torch.autograd.Function):
    """Weights are kept on the context, not among the saved tensors: each of those costs a layer that is recomputed calls into Python, and
    nothing changes them between forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        x = x.contiguous()
        added = None if residual is None else residual.contiguous()
        # A wide residual stream stays wide, whatever is added to it.
        h = x if added is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, added.dtype))
        y = torch.empty_like(x, dtype=dtype)
        width = x.shape[-1]
        rows = x.numel() // width
        scale = x.new_empty(rows, dtype=torch.float32)
        mean = torch.empty_like(scale) if center else scale
        if rows:
            launch = _forward_launch(width, center, added is not None, bias is not None)
            tensors = x, x if added is None else added, weight, weight if bias is None else bias, y, h, mean, scale
            launch((ceil(rows / launch.constants["ROWS"]),), tensors, (rows, width), (eps,))
        ctx.save_for_backward(h, scale, mean if center else None)
        ctx.weights, ctx.center, ctx.adds, ctx.dtype = (weight, bias), center, added is not None, x.dtype
        ctx.set_materialize_grads(False)
        return y, None if added is None else h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        h, scale, mean = ctx.saved_tensors
        (weight, bias), width, rows = ctx.weights, h.shape[-1], len(scale)
        dy, dh = (None if g is None else g.contiguous() for g in upstream)
        if dy is None:
            assert dh is not None
            return _in(dh, ctx.dtype), dh if ctx.adds else None, *[None] * 5
        trains = any(ctx.needs_input_grad[2:4])
        launch = _backward_launch(width, ctx.center, dh is not None, trains, bias is not None)
        tiles = ceil(rows / launch.constants["ROWS"])
        each = max(1, ceil(tiles / PROGRAMS)) if trains else 1
        programs, dx = ceil(tiles / each), torch.empty_like(h)
        dw = h.new_zeros(programs, width, dtype=torch.float32) if trains else scale
        db = torch.zeros_like(dw) if trains and bias is not None else dw
        if rows:
            tensors = dy, dy if dh is None else dh, h, weight, scale if mean is None else mean, scale, dx, dw, db
            launch((programs,), tensors, (rows, each, width))
        grad_w = dw.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        grad_b = db.sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[3] else None
        return _in(dx, ctx.dtype), dx if ctx.adds else None, grad_w, grad_b, *[None] * 3


def _in(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype; a conversion that changes nothing is a call all the same."""
    return x if x.dtype is dtype else x.to(dtype)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.norm`, with fp32 sums, for fp32, bf16 and fp16.

    Raises:
        ValueError: rows are wider than a program can hold.
    """
    if x.shape[-1] > MOST_WIDTH:
        raise ValueError(f"norm over {x.shape[-1]:,} values: the kernel holds at most {MOST_WIDTH:,}")
    y, h = _Norm.apply(x, residual, weight, bias, eps, center, dtype or x.dtype)
    return y, x if residual is None else h


@cache
def sizes(width: int, values: int, tile: int) -> dict[str, int]:
    """Rows, block and warps for rows of this width, about `tile` values to a program and `values` to a thread."""
    block = triton.next_power_of_2(max(width, 1))
    rows = max(1, tile // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // (32 * values)))}


@cache
def _forward_launch(width: int, center: bool, adds: bool, has_bias: bool) -> Launch:
    return Launch(_forward, CENTER=center, ADDS=adds, HAS_BIAS=has_bias, **sizes(width, FORWARD_VALUES, TILE))


@cache
def _backward_launch(width: int, center: bool, adds: bool, trains: bool, has_bias: bool) -> Launch:
    options = sizes(width, BACKWARD_VALUES, TILE if trains else 1)
    return Launch(_backward, CENTER=center, ADDS=adds, TRAINS=trains, HAS_BIAS=has_bias, **options)
