"""One pass forward, one backward, which computes the activation again instead of keeping it. Formulas are those of `reference.py`."""

from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from elite.kernels.launch import Launch

GELU_BLOCK, SWIGLU_BLOCK = 2048, 512
"""Values of a program; the gated one, which reads and writes more tensors, is faster by a percent with fewer (H100)."""
WARPS = 4


@triton.jit
def _swiglu_forward(gate, up, out, count, BLOCK: tl.constexpr):
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < count
    a = tl.load(gate + cells, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + cells, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(upstream, gate, up, d_gate, d_up, count, BLOCK: tl.constexpr):
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < count
    g = tl.load(upstream + cells, mask=inside, other=0.0).to(tl.float32)
    a = tl.load(gate + cells, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + cells, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(d_up + cells, (g * a * s).to(d_up.dtype.element_ty), mask=inside)
    tl.store(d_gate + cells, (g * b * s * (1.0 + a * (1.0 - s))).to(d_gate.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(upstream, x, bias, out, count, width, BACKWARD: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < count
    z = tl.load(x + cells, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + cells % width, mask=inside, other=0.0).to(tl.float32)
    # ½ (1 + tanh u) = sigmoid(2u), u = √(2/π) (z + 0.044715 z³)
    share = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    if BACKWARD:
        g = tl.load(upstream + cells, mask=inside, other=0.0).to(tl.float32)
        made = g * (share + z * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * z * z))
    else:
        made = z * share
    tl.store(out + cells, made.to(out.dtype.element_ty), mask=inside)


_swiglu_forward_launch = Launch(_swiglu_forward, BLOCK=SWIGLU_BLOCK, num_warps=WARPS)
_swiglu_backward_launch = Launch(_swiglu_backward, BLOCK=SWIGLU_BLOCK, num_warps=WARPS)
_gelu_launches = {
    (backward, has_bias): Launch(_gelu, BACKWARD=backward, HAS_BIAS=has_bias, BLOCK=GELU_BLOCK, num_warps=WARPS)
    for backward in (False, True)
    for has_bias in (False, True)
}
"""By whether it is the backward, and whether there is a bias."""


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.spend = _is_spent(gate) and _is_spent(up)
        gate, up = gate.contiguous(), up.contiguous()
        ctx.spend = ctx.spend and gate.data_ptr() != up.data_ptr()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        if gate.numel():
            _swiglu_forward_launch(_grid(gate, SWIGLU_BLOCK), (gate, up, out), (gate.numel(),))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = (_place(t, ctx.spend) for t in (gate, up))
        if gate.numel():
            tensors = upstream[0].contiguous(), gate, up, d_gate, d_up
            _swiglu_backward_launch(_grid(gate, SWIGLU_BLOCK), tensors, (gate.numel(),))
        return d_gate, d_up


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        ctx.spend = _is_spent(x)
        x = x.contiguous()
        ctx.save_for_backward(x)
        # Not among the saved tensors, as weights of a norm are not.
        ctx.bias = bias
        return _gelu_pass(x, x, bias, torch.empty_like(x), backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x,), bias = ctx.saved_tensors, ctx.bias
        dx = _gelu_pass(upstream[0].contiguous(), x, bias, _place(x, ctx.spend), backward=True)
        wanted = bias is not None and ctx.needs_input_grad[1]
        return dx, dx.flatten(0, -2).sum(0, dtype=torch.float32).to(bias.dtype) if wanted else None


def _is_spent(x: Tensor) -> bool:
    """Whether x, as given, has served once this function's backward has read it: an intermediate result, or a copy is made of it."""
    return not (x.is_leaf and x.is_contiguous())


def _place(x: Tensor, spend: bool) -> Tensor:
    """Where a gradient shaped as x goes: over x if it has served. A later backward that wants x hears of it from autograd."""
    if not spend:
        return torch.empty_like(x)
    torch.autograd.graph.increment_version(x)
    return x.detach()


def _gelu_pass(upstream: Tensor, x: Tensor, bias: Tensor | None, out: Tensor, backward: bool) -> Tensor:
    if x.numel():
        tensors = upstream, x, x if bias is None else bias, out
        _gelu_launches[backward, bias is not None](_grid(x, GELU_BLOCK), tensors, (x.numel(), x.shape[-1]))
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `reference.swiglu`, for fp32, bf16 and fp16."""
    out: Tensor = _SwiGLU.apply(gate, up)
    return out


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `reference.gelu_tanh`, for fp32, bf16 and fp16."""
    out: Tensor = _GELU.apply(x, bias)
    return out


def _grid(t: Tensor, block: int) -> tuple[int]:
    return (ceil(t.numel() / block),)
