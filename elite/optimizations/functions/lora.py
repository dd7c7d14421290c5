"""LoRA's linear map (Hu et al. 2021, arXiv:2106.09685) in few kernels, and its gradients.

    out = x Wᵀ + b + s (x Aᵀ) Bᵀ
    dA = s (dout B)ᵀ x      dB = s doutᵀ (x Aᵀ)      dx = dout W + s (dout B) A

An update added to an output wider than the input reads and writes all of that output again. There the two products become one, with
the rank beside the inner dimension: [x, x Aᵀ] [W, s B]ᵀ, which copies the narrower side instead; likewise dx where the input is wider.

Shapes: x [..., in], W [out, in], b [out], A [r, in], B [out, r]; W and b are frozen, A and B train. The factor s rides in the matrix
products. With dropout, `dropped` stands for x in everything that A and B touch.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ALIGNMENT = 8
"""Tensor cores want inner dimensions that are a multiple of this many half-precision values."""


def adapted_linear(
    x: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, unread: bool = False
) -> Tensor:
    """The whole map [..., in] → [..., out], in autocast's dtype where it is on, else in that of `weight`.

    Args:
        dropped: x after dropout; the same tensor where there is none.
        unread: nobody reads the output, only its gradient counts: zeros are returned instead.
    """
    # Passed once, the input has one gradient, which both products add to.
    out: Tensor = _AdaptedLinear.apply(x, None if dropped is x else dropped, weight, bias, a, b, scaling, unread)
    return out


def add_low_rank(out: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`out` [..., out] + s (x Aᵀ) Bᵀ, in the dtype of `out`, which stays as it is: another function may have returned a view."""
    added: Tensor = _AddLowRank.apply(out, x, a, b, scaling)
    return added


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        unread: bool,
    ) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        rows = x.to(dtype).flatten(0, -2)
        low = (rows if dropped is None else dropped.to(dtype).flatten(0, -2)) @ a.to(dtype).mT
        if unread:
            out = rows.new_zeros(len(rows), len(weight))
        else:
            out = _sum_of_products(rows, weight.to(dtype).mT, low, b.mT, scaling, None if bias is None else bias.to(dtype))
        # The base is frozen, so its own input is not needed.
        read = x if dropped is None else dropped
        ctx.save_for_backward(read, low, weight, a, b)
        ctx.scaling, ctx.dropout = scaling, dropped is not None
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        read, low, weight, a, b = ctx.saved_tensors
        grad = upstream[0].flatten(0, -2)
        down, grad_a, grad_b = _adapter_gradients(grad, read, low, b, ctx.scaling)
        grad_x = grad_dropped = None
        if ctx.dropout and ctx.needs_input_grad[1]:
            grad_dropped = _through_a(down, a, ctx.scaling).view_as(read).to(read.dtype)
        if ctx.needs_input_grad[0]:
            frozen = weight.to(grad.dtype)
            grad_x = grad @ frozen if ctx.dropout else _sum_of_products(grad, frozen, down, a, ctx.scaling, None)
            grad_x = grad_x.view_as(read).to(read.dtype)
        return grad_x, grad_dropped, None, None, grad_a.to(a.dtype), grad_b.to(b.dtype), None, None


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        low = x.to(out.dtype).flatten(0, -2) @ a.to(out.dtype).mT
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        return torch.addmm(out.flatten(0, -2), low, b.to(out.dtype).mT, alpha=scaling).view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        grad = upstream[0].flatten(0, -2)
        down, grad_a, grad_b = _adapter_gradients(grad, x, low, b, ctx.scaling)
        grad_x = _through_a(down, a, ctx.scaling).view_as(x).to(x.dtype) if ctx.needs_input_grad[1] else None
        return upstream[0], grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype), None


def _sum_of_products(x: Tensor, wide: Tensor, low: Tensor, narrow: Tensor, scaling: float, bias: Tensor | None) -> Tensor:
    """x · wide + s low · narrow + bias for x [n, k], wide [k, m], low [n, r], narrow [r, m] (of any dtype), bias [m]."""
    scaled = (narrow * scaling).to(x.dtype)
    if wide.shape[1] > wide.shape[0] and low.shape[1] % ALIGNMENT == 0:
        # Concatenated along the rows of what is stored, so that the product reads whole rows.
        both = torch.cat([wide.mT, scaled.mT], 1).mT if wide.mT.is_contiguous() else torch.cat([wide, scaled])
        one = torch.cat([x, low], 1)
        return one @ both if bias is None else torch.addmm(bias, one, both)
    out = x @ wide if bias is None else torch.addmm(bias, x, wide)
    return out.addmm_(low, scaled)


def _adapter_gradients(grad: Tensor, x: Tensor, low: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """`grad` [tokens, out] → dout B [tokens, r], dA, dB; the last two with the sum over tokens in fp32 at least."""
    down = grad @ b.to(grad.dtype)
    rows = x.to(grad.dtype).flatten(0, -2)
    return down, _wide_product(down.mT, rows).mul_(scaling), _wide_product(grad.mT, low).mul_(scaling)


def _through_a(down: Tensor, a: Tensor, scaling: float) -> Tensor:
    return (down @ a.to(down.dtype)).mul_(scaling)


def _wide_product(one: Tensor, two: Tensor) -> Tensor:
    """one @ two, in fp32 for half inputs; without rounding to half in between where the library can (CUDA)."""
    if torch.promote_types(one.dtype, torch.float32) == one.dtype:
        return one @ two
    return torch.mm(one, two, out_dtype=torch.float32) if one.is_cuda else (one @ two).float()
