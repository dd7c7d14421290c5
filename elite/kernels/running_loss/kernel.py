"""One program a token: a tile's logits become exponentials in place in one pass, whose sums move on only where the largest logit did.

What a matrix product has just written comes from the cache. Formulas are those of `reference.py`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from elite.kernels.launch import Launch

VALUES = 16
"""Logits of a thread."""
BLOCK = 1024
"""Values of a row of the head that a program holds at once."""
WARPS = 4


@triton.jit
def _absorb(
    logits, bias, labels, state, sums, row_stride, first, count, tokens, width,
    HAS_BIAS: tl.constexpr, SMOOTH: tl.constexpr, SUMS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * row_stride
    columns = tl.arange(0, COLUMNS)
    inside = columns < count
    z = tl.load(row + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(labels + token) - first
    if (own >= 0) & (own < count):
        tl.store(state + 2 * tokens + token, tl.sum(tl.where(columns == own, z, 0.0), 0))
    if SMOOTH:
        plain = state + 3 * tokens + token
        tl.store(plain, tl.load(plain) + tl.sum(tl.where(inside, z, 0.0), 0))
    before = tl.load(state + token)
    most = tl.maximum(before, tl.max(z, 0))
    # Where every logit was −∞, so is the largest.
    base = tl.where(most > float("-inf"), most, 0.0)
    shrunk = tl.exp(before - base)
    z = tl.exp(z - base)
    total = state + tokens + token
    tl.store(total, tl.load(total) * shrunk + tl.sum(z, 0))
    tl.store(state + token, most)
    if SUMS:
        tl.store(row + columns, z.to(logits.dtype.element_ty), mask=inside)
        # One is known when the kernel is compiled, the other is not.
        if not FIRST:  # noqa: SIM102
            if most > before:
                for start in range(0, width, BLOCK):
                    cells = start + tl.arange(0, BLOCK)
                    own_sums = sums + token.to(tl.int64) * width + cells
                    tl.store(own_sums, tl.load(own_sums, mask=cells < width, other=0.0) * shrunk, mask=cells < width)


@triton.jit
def _finish(
    state, labels, losses, sums, weight, mean, gradient, tokens, width, vocab, ignore_index, smoothing, z_loss,
    GRADIENT: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token)
    valid = label != ignore_index
    total = tl.load(state + tokens + token)
    lse = tl.load(state + token) + tl.log(total)
    loss = lse - (1.0 - smoothing) * tl.load(state + 2 * tokens + token) + z_loss * lse * lse
    if SMOOTH:
        loss -= smoothing * (tl.load(state + 3 * tokens + token) / vocab)
    tl.store(losses + token, tl.where(valid, loss, 0.0))
    if GRADIENT:
        share = (1.0 + 2.0 * z_loss * lse) / total
        wanted = weight + tl.where(valid, label, 0) * width
        for start in range(0, width, BLOCK):
            cells = start + tl.arange(0, BLOCK)
            inside = cells < width
            made = share * tl.load(sums + token * width + cells, mask=inside, other=0.0)
            made -= (1.0 - smoothing) * tl.load(wanted + cells, mask=inside, other=0.0).to(tl.float32)
            if SMOOTH:
                made -= smoothing * tl.load(mean + cells, mask=inside, other=0.0)
            tl.store(gradient + token * width + cells, tl.where(valid, made, 0.0).to(gradient.dtype.element_ty), mask=inside)


def absorb(logits: Tensor, bias: Tensor | None, labels: Tensor, first: int, state: Tensor, sums: Tensor | None) -> None:
    """As `reference.absorb`, for fp32, bf16 and fp16 logits with contiguous rows of a few thousand."""
    (tokens, count), spare = logits.shape, logits if sums is None else sums
    launch = _absorb_launch(count, bias is not None, len(state) == 4, sums is not None, first == 0)
    tensors = logits, logits if bias is None else bias, labels, state, spare
    launch((tokens,), tensors, (logits.stride(0), first, count, tokens, spare.shape[1]))


def add_rows(sums: Tensor, shares: Tensor, rows: Tensor, fresh: bool) -> None:
    """As `reference.add_rows`: the library's product, which adds half factors up in fp32."""
    if shares.dtype == sums.dtype:
        sums.addmm_(shares, rows, beta=0 if fresh else 1)
    elif fresh:
        torch.mm(shares, rows, out_dtype=sums.dtype, out=sums)
    else:
        torch.addmm(sums, shares, rows, out_dtype=sums.dtype, out=sums)


def finish(
    state: Tensor, labels: Tensor, vocab: int, ignore_index: int, label_smoothing: float, z_loss: float,
    sums: Tensor | None = None, weight: Tensor | None = None, mean: Tensor | None = None, gradient: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `reference.finish`, for fp32 states and contiguous rows."""
    tokens = len(labels)
    losses = torch.empty(tokens, dtype=torch.float32, device=state.device)
    matrices = [state if t is None else t for t in (sums, weight, mean, gradient)]
    numbers = tokens, matrices[0].shape[1], vocab, ignore_index
    launch = _finish_launch(gradient is not None, len(state) == 4)
    launch((tokens,), (state, labels, losses, *matrices), numbers, (float(label_smoothing), float(z_loss)))
    return losses


@cache
def _absorb_launch(count: int, has_bias: bool, smooth: bool, sums: bool, first: bool) -> Launch:
    return Launch(_absorb, HAS_BIAS=has_bias, SMOOTH=smooth, SUMS=sums, FIRST=first, BLOCK=BLOCK, **sizes(count))


@cache
def _finish_launch(gradient: bool, smooth: bool) -> Launch:
    return Launch(_finish, GRADIENT=gradient, SMOOTH=smooth, BLOCK=BLOCK, num_warps=WARPS)


@cache
def sizes(count: int) -> dict[str, int]:
    """Compile-time size for tiles of so many logits, and warps."""
    columns = triton.next_power_of_2(count)
    return {"COLUMNS": columns, "num_warps": min(16, max(1, columns // (32 * VALUES)))}
