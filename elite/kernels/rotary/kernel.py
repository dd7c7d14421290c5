"""Queries and keys of a token in one program: its angles are read once, what is not turned is not touched. Formulas: `reference.py`.

Forward in place: neither projections nor norms need what they returned. The gradient is turned back, (g, h) → (g cos + h sin,
h cos − g sin), where it lies if it is spent and laid out as the projections want it, else into new memory that is.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from elite.kernels.launch import Launch

HEADS_PER_WARP = 8
MOST_WARPS = 4


@triton.jit
def _turn(
    x, out, token, out_token, x_head, out_head, cos, sin,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, HALF: tl.constexpr, HALF_UP: tl.constexpr, REST: tl.constexpr, REST_UP: tl.constexpr,
    BACKWARD: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    heads = tl.arange(0, HEADS_UP)[:, None]
    columns = tl.arange(0, HALF_UP)[None, :]
    inside = (heads < HEADS) & (columns < HALF)
    source, target = x + token + heads * x_head, out + out_token + heads * out_head
    a = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + HALF + columns, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        first, second = a * cos + b * sin, b * cos - a * sin
    else:
        first, second = a * cos - b * sin, b * cos + a * sin
    tl.store(target + columns, first.to(out.dtype.element_ty), mask=inside)
    tl.store(target + HALF + columns, second.to(out.dtype.element_ty), mask=inside)
    if COPIES and REST > 0:
        others = tl.arange(0, REST_UP)[None, :]
        beyond = (heads < HEADS) & (others < REST)
        kept = tl.load(source + 2 * HALF + others, mask=beyond, other=0.0)
        tl.store(target + 2 * HALF + others, kept.to(out.dtype.element_ty), mask=beyond)


@triton.jit
def _kernel(
    q, k, q_out, k_out, cos, sin, tokens,
    q_row, q_token, q_head, k_row, k_token, k_head,
    q_out_row, q_out_token, q_out_head, k_out_row, k_out_token, k_out_head, angle_row, angle_token,
    Q_HEADS: tl.constexpr, Q_UP: tl.constexpr, K_HEADS: tl.constexpr, K_UP: tl.constexpr,
    HALF: tl.constexpr, HALF_UP: tl.constexpr, REST: tl.constexpr, REST_UP: tl.constexpr,
    BACKWARD: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row, token = place // tokens, place % tokens
    columns = tl.arange(0, HALF_UP)[None, :]
    inside = columns < HALF
    angles = row * angle_row + token * angle_token + columns
    c = tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)
    _turn(
        q, q_out, row * q_row + token * q_token, row * q_out_row + token * q_out_token, q_head, q_out_head,
        c, s, Q_HEADS, Q_UP, HALF, HALF_UP, REST, REST_UP, BACKWARD, COPIES,
    )  # fmt: skip
    _turn(
        k, k_out, row * k_row + token * k_token, row * k_out_row + token * k_out_token, k_head, k_out_head,
        c, s, K_HEADS, K_UP, HALF, HALF_UP, REST, REST_UP, BACKWARD, COPIES,
    )  # fmt: skip


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, spend: bool) -> tuple[Tensor, Tensor]:
        _launch(q, k, q, k, cos, sin, backward=False)
        # Who has kept q or k for a backward of their own hears of it from autograd, rather than reading other values. What is returned is
        # a view, as autograd allows no function to change two views in place.
        torch.autograd.graph.increment_version((q, k))
        # Not among the saved tensors, as weights of a norm are not.
        ctx.angles, ctx.spend = (cos, sin), spend
        return q.view_as(q), k.view_as(k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.angles
        dq, dk = (g if g.stride(-1) == 1 else g.contiguous() for g in upstream)
        if ctx.spend and dq.is_contiguous() and dk.is_contiguous():
            _launch(dq, dk, dq, dk, cos, sin, backward=True)
            torch.autograd.graph.increment_version((dq, dk))
            return dq, dk, None, None, None
        q_out, k_out = (torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in (dq, dk))
        _launch(dq, dk, q_out, k_out, cos, sin, backward=True)
        return q_out, k_out, None, None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, spend: bool = False) -> tuple[Tensor, Tensor]:
    """As `reference.rotary`, for fp32, bf16 and fp16, in place: what is returned lies where `q` and `k` lay.

    Args:
        q, k: values of a head side by side in memory, otherwise of any layout.
        cos, sin: only the first half is read; the other one is the same, or nothing would be turned.
        spend: whoever reads the result makes its gradient for this function alone, as attention does, so that it may be written over.

    Raises:
        ValueError: they are not, or the angles are more than a head has values.
    """
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        raise ValueError(
            f"heads of strides {q.stride(-1)} and {k.stride(-1)}: a head's values must lie side by side, as projections leave them"
        )
    width = cos.shape[-1]
    if width % 2 or width > q.shape[-1]:
        raise ValueError(f"{width} values of a head of {q.shape[-1]} cannot be turned: an even number, at most the head's")
    turned: tuple[Tensor, Tensor] = _Rotary.apply(q, k, cos.contiguous(), sin.contiguous(), spend)
    return turned


def _launch(q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> None:
    rows, tokens, heads, head_dim = q.shape
    half, kv_heads = cos.shape[-1] // 2, k.shape[2]
    if not rows * tokens:
        return
    launch = _launch_of(heads, kv_heads, half, head_dim - 2 * half, backward, q_out is not q)
    # One row of angles may serve all rows.
    angles = cos.stride(0) if len(cos) > 1 else 0, cos.stride(1)
    strides = *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3], *angles
    launch((rows * tokens,), (q, k, q_out, k_out, cos, sin), (tokens, *strides))


@cache
def _launch_of(heads: int, kv_heads: int, half: int, rest: int, backward: bool, copies: bool) -> Launch:
    return Launch(_kernel, BACKWARD=backward, COPIES=copies, **sizes(heads, kv_heads, half, rest))


@cache
def sizes(heads: int, kv_heads: int, half: int, rest: int) -> dict[str, int]:
    """Compile-time sizes for heads of 2 · half + rest values, and warps."""
    up = triton.next_power_of_2
    warps = max(1, min(MOST_WARPS, (up(heads) + up(kv_heads)) // HEADS_PER_WARP))
    return {
        "Q_HEADS": heads,
        "Q_UP": up(heads),
        "K_HEADS": kv_heads,
        "K_UP": up(kv_heads),
        "HALF": half,
        "HALF_UP": up(max(half, 1)),
        "REST": rest,
        "REST_UP": up(max(rest, 1)),
        # A power of two.
        "num_warps": 1 << (warps.bit_length() - 1),
    }
