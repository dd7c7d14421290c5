"""LoRA's linear map (Hu et al. 2021, arXiv:2106.09685) in few kernels, and its gradients.

    out = x Wᵀ + b + s (x Aᵀ) Bᵀ
    dA = s (dout B)ᵀ x      dB = s doutᵀ (x Aᵀ)      dx = dout W + s (dout B) A

An update added to an output wider than the input reads and writes all of that output again. There the two products become one, with
the rank beside the inner dimension: [x, x Aᵀ] [W, s B]ᵀ, which copies the narrower side instead; likewise dx where the input is wider.

Maps of one input (queries, keys and values; gate and up) are one function: its adapters' As stand side by side, so that x is read once
for all of them, and dx is added up inside the matrix products instead of between them.

Shapes: x [..., in], W [out, in], b [out], A [r, in], B [out, r]; W and b are frozen, A and B train. The products read A and s B in the
dtype of computation (`Operands`). With dropout, `dropped` stands for x in everything that A and B touch.

W and the operands are kept on a function's context, not among its saved tensors: each of those costs a layer that is recomputed two
calls into Python, and nothing changes them between forward and backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from elite.optimizations.shapes import ALIGNMENT


class AdaptedMap(NamedTuple):
    """A frozen linear map and its adapter; made at every call of one, which a dataclass makes slowly."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True)
class Ready:
    """What the matrix products of maps that share an input read of their adapters, in the dtype of computation."""

    above: Tensor
    """All A's, one above the other: [R, in]."""
    beside: tuple[Tensor, ...]
    """s B of each map [out, R], with zeros where the other maps' values meet it."""
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]


class Operands:
    """The `Ready` of one map or of siblings, made once an optimizer step: forward, recomputation and backward share it."""

    def __init__(self) -> None:
        self._maps: Sequence[AdaptedMap] = ()
        self._state: tuple[object, ...] = ()
        self._ready: Ready | None = None

    def get(self, maps: Sequence[AdaptedMap], dtype: torch.dtype) -> Ready:
        """Of these maps as they are now."""
        # Optimizers that write through pointers leave a tensor's version as it was, hence the count of their steps.
        state: list[object] = [dtype, _steps.count]
        for m in maps:
            state += [id(m.a), m.a.device, m.a._version, id(m.b), m.b._version, m.scaling]
        if self._ready is None or tuple(state) != self._state:
            # The maps stay alive, so that no other tensor gets their identity.
            self._maps, self._state, self._ready = maps, tuple(state), _ready(maps, dtype)
        return self._ready


class _Steps:
    """Optimizer steps of this process."""

    def __init__(self) -> None:
        self.count = 0

    def one_more(self, *_: object) -> None:
        self.count += 1


_steps = _Steps()
register_optimizer_step_post_hook(_steps.one_more)


@torch.inference_mode(False)
@torch.no_grad()
def _ready(maps: Sequence[AdaptedMap], dtype: torch.dtype) -> Ready:
    """Converted as they are written, in one call for each tensor: this is done for every map in every step."""
    ranks, outputs = [len(m.a) for m in maps], [len(m.b) for m in maps]
    total, one = sum(ranks), maps[0].a
    above = torch.cat([m.a for m in maps], out=one.new_empty(total, one.shape[1], dtype=dtype))
    # Where another map's values meet a map's B, there are zeros.
    shape = sum(outputs), total
    beside = one.new_empty(shape, dtype=dtype) if len(maps) == 1 else one.new_zeros(shape, dtype=dtype)
    parts, first = beside.split(outputs), 0
    for m, rank, part in zip(maps, ranks, parts, strict=True):
        torch.mul(m.b, m.scaling, out=part.narrow(1, first, rank))
        first += rank
    return Ready(above, parts, tuple(ranks), tuple(m.scaling for m in maps))


def adapted_linear(x: Tensor, dropped: Tensor, map_: AdaptedMap, operands: Operands, unread: bool = False) -> Tensor:
    """The whole map [..., in] → [..., out], in autocast's dtype where it is on, else in that of its weight.

    Args:
        dropped: x after dropout; the same tensor where there is none.
        operands: this map's.
        unread: nobody reads the output, only its gradient counts: zeros are returned instead.
    """
    dtype = _compute_dtype(x, map_.weight)
    frozen = map_.weight, map_.bias, operands.get((map_,), dtype), dtype, unread
    # Passed once, the input has one gradient, which both products add to.
    out: Tensor = _AdaptedLinear.apply(x, None if dropped is x else dropped, map_.a, map_.b, frozen)
    return out


def adapted_linears(x: Tensor, maps: Sequence[AdaptedMap], operands: Operands) -> tuple[Tensor, ...]:
    """Several maps of one input [..., in], without dropout: what `adapted_linear` would make of each, [..., out] of its own."""
    dtype = _compute_dtype(x, maps[0].weight)
    frozen = [m.weight for m in maps], [m.bias for m in maps], operands.get(maps, dtype), dtype
    outputs: tuple[Tensor, ...] = _AdaptedLinears.apply(x, frozen, *(t for m in maps for t in (m.a, m.b)))
    return outputs


def add_low_rank(out: Tensor, x: Tensor, map_: AdaptedMap, operands: Operands) -> Tensor:
    """`out` [..., out] + s (x Aᵀ) Bᵀ, in autocast's dtype where it is on; `out` stays: another function may have returned a view."""
    added: Tensor = _AddLowRank.apply(out, x, map_.a, map_.b, operands.get((map_,), _compute_dtype(x, out)))
    return added


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, frozen: tuple[Any, ...]) -> Tensor:
        weight, bias, ready, dtype, unread = frozen
        rows = _as(x, dtype).flatten(0, -2)
        low = (rows if dropped is None else _as(dropped, dtype).flatten(0, -2)) @ ready.above.mT
        if unread:
            out = rows.new_zeros(len(rows), len(weight))
        else:
            out = _sum_of_products(rows, _as(weight, dtype).mT, low, ready.beside[0].mT, _bias(bias, dtype))
        # The base is frozen, so its own input is not needed.
        ctx.save_for_backward(x if dropped is None else dropped, low)
        ctx.weight, ctx.ready, ctx.dropout, ctx.dtypes = weight, ready, dropped is not None, (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        read, low = ctx.saved_tensors
        above, grad = ctx.ready.above, upstream[0].flatten(0, -2)
        down, grad_a, grad_b = _adapter_gradients(grad, read, low, ctx.ready)
        grad_x = grad_dropped = None
        if ctx.dropout and ctx.needs_input_grad[1]:
            grad_dropped = _as((down @ above).view_as(read), read.dtype)
        if ctx.needs_input_grad[0]:
            weight = _as(ctx.weight, grad.dtype)
            grad_x = grad @ weight if ctx.dropout else _sum_of_products(grad, weight, down, above, None)
            grad_x = _as(grad_x.view_as(read), read.dtype)
        return grad_x, grad_dropped, _as(grad_a, ctx.dtypes[0]), _as(grad_b, ctx.dtypes[1]), None


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: tuple[Any, ...], *adapters: Tensor) -> tuple[Tensor, ...]:
        weights, biases, ready, dtype = frozen
        rows = _as(x, dtype).flatten(0, -2)
        low = rows @ ready.above.mT
        ctx.save_for_backward(x, low)
        ctx.weights, ctx.ready, ctx.dtypes = weights, ready, [t.dtype for t in adapters]
        ctx.set_materialize_grads(False)
        both, outputs = torch.cat([rows, low], 1), []
        for weight, bias, beside in zip(weights, biases, ready.beside, strict=True):
            wide = torch.cat([_as(weight, dtype), beside], 1).mT
            outputs.append((both @ wide if bias is None else torch.addmm(_as(bias, dtype), both, wide)).view(*x.shape[:-1], -1))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        x, low = ctx.saved_tensors
        weights, ranks, above = ctx.weights, ctx.ready.ranks, ctx.ready.above
        # A map whose output nobody used has no part in anything.
        grads = [low.new_zeros(len(low), len(w)) if g is None else g.flatten(0, -2) for g, w in zip(upstream, weights, strict=True)]
        down = torch.empty_like(low)
        own = [beside.narrow(1, sum(ranks[:i]), ranks[i]) for i, beside in enumerate(ctx.ready.beside)]
        for grad, b, part in zip(grads, own, down.split(ranks, 1), strict=True):
            torch.mm(grad, b, out=part)
        grads_a = _wide_product(down.mT, _as(x, low.dtype).flatten(0, -2)).split(ranks)
        of_maps: list[Tensor] = []
        for grad, part, grad_a, scaling in zip(grads, low.split(ranks, 1), grads_a, ctx.ready.scalings, strict=True):
            of_maps += [grad_a, _wide_product(grad.mT, part).mul_(scaling)]
        grad_x = _as(_summed_through(grads, weights, down, above).view_as(x), x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, *(_as(grad, dtype) for grad, dtype in zip(of_maps, ctx.dtypes, strict=True))


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, ready: Ready) -> Tensor:
        dtype = ready.above.dtype
        low = _as(x, dtype).flatten(0, -2) @ ready.above.mT
        ctx.save_for_backward(x, low)
        ctx.ready, ctx.dtypes, ctx.out_dtype = ready, (a.dtype, b.dtype), out.dtype
        return torch.addmm(_as(out, dtype).flatten(0, -2), low, ready.beside[0].mT).view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, low = ctx.saved_tensors
        down, grad_a, grad_b = _adapter_gradients(upstream[0].flatten(0, -2), x, low, ctx.ready)
        grad_x = _as((down @ ctx.ready.above).view_as(x), x.dtype) if ctx.needs_input_grad[1] else None
        return _as(upstream[0], ctx.out_dtype), grad_x, _as(grad_a, ctx.dtypes[0]), _as(grad_b, ctx.dtypes[1]), None


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype. A conversion that changes nothing is still a call that the host makes, thousands of times a step."""
    return x if x.dtype is dtype else x.to(dtype)


def _bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else _as(bias, dtype)


def _summed_through(grads: Sequence[Tensor], weights: Sequence[Tensor], down: Tensor, above: Tensor) -> Tensor:
    """Σ grad · weight + down · above [tokens, in] for down [tokens, R], above [R, in].

    What has fewer columns than the result goes into one product, the others are added to it one by one.
    """
    dtype, width = down.dtype, above.shape[1]
    few = [i for i, grad in enumerate(grads) if grad.shape[1] < width]
    left = torch.cat([*(grads[i] for i in few), down], 1)
    total = left @ torch.cat([*(_as(weights[i], dtype) for i in few), above])
    for i, grad in enumerate(grads):
        if i not in few:
            total.addmm_(grad, _as(weights[i], dtype))
    return total


def _sum_of_products(x: Tensor, wide: Tensor, low: Tensor, narrow: Tensor, bias: Tensor | None) -> Tensor:
    """x · wide + low · narrow + bias for x [n, k], wide [k, m], low [n, r], narrow [r, m], bias [m]."""
    (n, k), m = x.shape, wide.shape[1]
    # One product copies both its factors first, two products read and write the result once more.
    if k * (n + m) < n * m and low.shape[1] % ALIGNMENT == 0:
        # Concatenated along the rows of what is stored, so that the product reads whole rows.
        both = torch.cat([wide.mT, narrow.mT], 1).mT if wide.mT.is_contiguous() else torch.cat([wide, narrow])
        one = torch.cat([x, low], 1)
        return one @ both if bias is None else torch.addmm(bias, one, both)
    out = x @ wide if bias is None else torch.addmm(bias, x, wide)
    return out.addmm_(low, narrow)


def _adapter_gradients(grad: Tensor, x: Tensor, low: Tensor, ready: Ready) -> tuple[Tensor, Tensor, Tensor]:
    """`grad` [tokens, out] → s dout B [tokens, r], dA, dB; the last two with the sum over tokens in fp32 at least."""
    down = grad @ ready.beside[0]
    rows = _as(x, grad.dtype).flatten(0, -2)
    return down, _wide_product(down.mT, rows), _wide_product(grad.mT, low).mul_(ready.scalings[0])


def _wide_product(one: Tensor, two: Tensor) -> Tensor:
    """one @ two, in fp32 for half inputs; without rounding to half in between where the library can (CUDA)."""
    if torch.promote_types(one.dtype, torch.float32) == one.dtype:
        return one @ two
    return torch.mm(one, two, out_dtype=torch.float32) if one.is_cuda else (one @ two).float()
