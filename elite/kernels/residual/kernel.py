"""One pass forward and one backward, where plain torch writes each dropped part with its mask, then each sum.

Masks are not kept: a mask's values come from a counter (Philox, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and a
seed drawn from torch's generator, and the backward makes them again. So whoever restores torch's random state, as activation checkpointing
does, gets the same masks. Formulas are those of `reference.py`.
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

LANES = 512
"""Values of a program, over four: one counter gives four random numbers."""
WARPS = 4
MOST_PARTS = 2


@triton.jit
def _kept(seed, lanes, p):
    """Factors of four values: 0 for a dropped one, else 1 / (1 − p)."""
    a, b, c, d = tl.rand4x(seed, lanes)
    scale = 1.0 / (1.0 - p)
    return tl.where(a >= p, scale, 0.0), tl.where(b >= p, scale, 0.0), tl.where(c >= p, scale, 0.0), tl.where(d >= p, scale, 0.0)


@triton.jit
def _add_one(residual, first, second, out, cells, count, keep_first, keep_second, PARTS: tl.constexpr, BACKWARD: tl.constexpr):
    """Forward: out = residual + first · keep + …; backward: `residual` is the gradient that arrives, the parts' gradients are written."""
    inside = cells < count
    total = tl.load(residual + cells, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        tl.store(first + cells, (total * keep_first).to(first.dtype.element_ty), mask=inside)
        if PARTS == 2:
            tl.store(second + cells, (total * keep_second).to(second.dtype.element_ty), mask=inside)
    else:
        total += tl.load(first + cells, mask=inside, other=0.0).to(tl.float32) * keep_first
        if PARTS == 2:
            total += tl.load(second + cells, mask=inside, other=0.0).to(tl.float32) * keep_second
        tl.store(out + cells, total.to(out.dtype.element_ty), mask=inside)


# Seeds are never the same twice: specialised, every sixteenth would be compiled anew.
@triton.jit(do_not_specialize=["seed_first", "seed_second"])
def _kernel(
    residual, first, second, out, count, p, seed_first: tl.int64, seed_second: tl.int64,
    PARTS: tl.constexpr, DROPS: tl.constexpr, BACKWARD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lanes = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    cells = tl.program_id(0).to(tl.int64) * (4 * LANES) + tl.arange(0, LANES)
    ones = tl.full((LANES,), 1.0, tl.float32)
    a, b, c, d = ones, ones, ones, ones
    e, f, g, h = ones, ones, ones, ones
    if DROPS:
        a, b, c, d = _kept(seed_first, lanes, p)
        if PARTS == 2:
            e, f, g, h = _kept(seed_second, lanes, p)
    _add_one(residual, first, second, out, cells, count, a, e, PARTS, BACKWARD)
    _add_one(residual, first, second, out, cells + LANES, count, b, f, PARTS, BACKWARD)
    _add_one(residual, first, second, out, cells + 2 * LANES, count, c, g, PARTS, BACKWARD)
    _add_one(residual, first, second, out, cells + 3 * LANES, count, d, h, PARTS, BACKWARD)


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, p: float, *parts: Tensor) -> Tensor:
        ctx.p, ctx.dtypes = p, tuple(part.dtype for part in parts)
        ctx.seeds = [_draw(residual.device) if p else 0 for _ in parts]
        residual, out = residual.contiguous(), torch.empty_like(residual, memory_format=torch.contiguous_format)
        _launch(residual, [part.contiguous() for part in parts], out, p, ctx.seeds, backward=False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        arriving = upstream[0].contiguous()
        if not ctx.p:
            return arriving, None, *(arriving.to(dtype) for dtype in ctx.dtypes)
        gradients = [torch.empty_like(arriving, dtype=dtype) for dtype in ctx.dtypes]
        _launch(arriving, gradients, arriving, ctx.p, ctx.seeds, backward=True)
        return arriving, None, *gradients


def add_dropped(residual: Tensor, parts: tuple[Tensor, ...], p: float) -> Tensor:
    """As `reference.add_dropped`, for fp32, bf16 and fp16; the seed of each part's mask is drawn from torch's default generator.

    Raises:
        ValueError: there are more than two parts, or p is none of a probability below 1.
    """
    if not 1 <= len(parts) <= MOST_PARTS or any(part.shape != residual.shape for part in parts):
        raise ValueError(f"{len(parts)} parts of shapes {[tuple(part.shape) for part in parts]}: one or two, shaped as the residual")
    if not 0 <= p < 1:
        raise ValueError(f"dropout of {p}: a probability, 0 ≤ p < 1")
    out: Tensor = _AddDropped.apply(residual, p, *parts)
    return out


def _launch(residual: Tensor, parts: list[Tensor], out: Tensor, p: float, seeds: list[int], backward: bool) -> None:
    if residual.numel():
        launch = _launch_of(len(parts), p > 0, backward)
        grid, tensors = (ceil(residual.numel() / (4 * LANES)),), (residual, parts[0], parts[-1], out)
        launch(grid, tensors, (residual.numel(),), (float(p), seeds[0], seeds[-1]))


@cache
def _launch_of(parts: int, drops: bool, backward: bool) -> Launch:
    return Launch(_kernel, PARTS=parts, DROPS=drops, BACKWARD=backward, LANES=LANES, num_warps=WARPS)


def _draw(device: torch.device) -> int:
    """63 random bits from the device's default generator, without waiting for the device."""
    if device.type != "cuda":
        return int(torch.randint(2**63 - 1, ()))
    index = device.index if device.index is not None else torch.cuda.current_device()
    generator = torch.cuda.default_generators[index]
    drawn = generator.get_offset()
    # A generator counts in fours.
    generator.set_offset(drawn + 4)
    return _mixed(generator.initial_seed() + drawn)


def _mixed(value: int) -> int:
    """Neighbouring values far apart, 63 bits: SplitMix64 (Steele, Lea and Flood 2014)."""
    mask = 2**64 - 1
    value = (value * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) >> 1
