"""LoRA's linear map (Hu et al. 2021, arXiv:2106.09685) in few kernels, and its gradients.

    out = x Wᵀ + b + s (x Aᵀ) Bᵀ
    dA = s (dout B)ᵀ x      dB = s doutᵀ (x Aᵀ)      dx = dout W + s (dout B) A

An update added to an output wider than the input reads and writes all of that output again. There the two products become one, with
the rank beside the inner dimension: [x, x Aᵀ] [W, s B]ᵀ, which copies the narrower side instead; likewise dx where the input is wider.

Maps of one input (queries, keys and values; gate and up) are one function: its adapters' As stand side by side, so that x is read once
for all of them, and dx is added up inside the matrix products instead of between them.

Shapes: x [..., in], W [out, in], b [out], A [r, in], B [out, r]; W and b are frozen, A and B train. The factor s rides in the matrix
products. With dropout, `dropped` stands for x in everything that A and B touch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ALIGNMENT = 8
"""Tensor cores want inner dimensions that are a multiple of this many half-precision values."""


@dataclass(frozen=True)
class AdaptedMap:
    """One of several maps of an input."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, A, B."""
        return self.weight, self.bias, self.a, self.b


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


def adapted_linears(x: Tensor, maps: Sequence[AdaptedMap]) -> tuple[Tensor, ...]:
    """Several maps of one input [..., in], without dropout: what `adapted_linear` would make of each, [..., out] of its own."""
    outputs: tuple[Tensor, ...] = _AdaptedLinears.apply(x, tuple(m.scaling for m in maps), *(t for m in maps for t in m.tensors))
    return outputs


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
        dtype = _compute_dtype(x, weight)
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


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights: Any
        up_maps: Any
        weights, biases, down_maps, up_maps = (tensors[i::4] for i in range(4))
        dtype = _compute_dtype(x, weights[0])
        rows, ranks = x.to(dtype).flatten(0, -2), [b.shape[1] for b in up_maps]
        scaled = _scaled(down_maps, scalings, dtype)
        low = rows @ scaled.mT
        ctx.save_for_backward(x, low, scaled, *weights, *up_maps)
        ctx.scalings = scalings
        ctx.set_materialize_grads(False)
        both, outputs = torch.cat([rows, low], 1), []
        for i, (weight, bias, b) in enumerate(zip(weights, biases, up_maps, strict=True)):
            # The other maps' low-rank values meet zeros.
            beside = [b.to(dtype) if i == j else rows.new_zeros(len(b), rank) for j, rank in enumerate(ranks)]
            wide = torch.cat([weight.to(dtype), *beside], 1).mT
            outputs.append((both @ wide if bias is None else torch.addmm(bias.to(dtype), both, wide)).view(*x.shape[:-1], -1))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x, low, scaled, *tensors = ctx.saved_tensors
        weights, up_maps = tensors[: len(upstream)], tensors[len(upstream) :]
        # A map whose output nobody used has no part in anything.
        grads = [low.new_zeros(len(low), len(w)) if g is None else g.flatten(0, -2) for g, w in zip(upstream, weights, strict=True)]
        ranks = [b.shape[1] for b in up_maps]
        down = torch.empty_like(low)
        for grad, b, part in zip(grads, up_maps, down.split(ranks, 1), strict=True):
            torch.mm(grad, b.to(grad.dtype), out=part)
        grads_a = _wide_product(down.mT, x.to(low.dtype).flatten(0, -2)).split(ranks)
        of_maps: list[Tensor | None] = []
        for grad, part, b, grad_a, scaling in zip(grads, low.split(ranks, 1), up_maps, grads_a, ctx.scalings, strict=True):
            of_maps += [None, None, (grad_a * scaling).to(b.dtype), _wide_product(grad.mT, part).to(b.dtype)]
        grad_x = _summed_through(grads, weights, down, scaled).view_as(x).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, *of_maps


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


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _scaled(maps: Sequence[Any], scalings: Sequence[float], dtype: torch.dtype) -> Tensor:
    """s A of each map, one above the other: [r, in] each → [Σ r, in]."""
    return torch.cat([a * scaling for a, scaling in zip(maps, scalings, strict=True)]).to(dtype)


def _summed_through(grads: Sequence[Tensor], weights: Sequence[Tensor], down: Tensor, a: Tensor) -> Tensor:
    """Σ grad · weight + down · a [tokens, in] for down [tokens, Σ r], a [Σ r, in].

    What has fewer columns than the result goes into one product, the others are added to it one by one.
    """
    dtype, width = down.dtype, a.shape[1]
    few = [i for i, grad in enumerate(grads) if grad.shape[1] < width]
    left = torch.cat([*(grads[i] for i in few), down], 1)
    total = left @ torch.cat([*(weights[i].to(dtype) for i in few), a])
    for i, grad in enumerate(grads):
        if i not in few:
            total.addmm_(grad, weights[i].to(dtype))
    return total


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
