"""Linear maps whose frozen weights are packed in four bits.

bitsandbytes packs them, and multiplies with them where rows are few. Where they are many, as in training, it makes each matrix whole in
several operations of its own, each dispatched in Python; here one kernel does (elite/kernels/dequantise), bit for bit the same.
"""

from importlib.util import find_spec
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor
from torch.autograd.function import once_differentiable

from elite.kernels.dequantise.reference import BLOCK, COARSE, Packed

# Here and not where it is called, which the compiler traces.
if torch.cuda.is_available() and find_spec("triton"):
    from elite.kernels.dequantise.kernel import dequantised
else:
    dequantised: Any = None  # type: ignore[no-redef]

MANY = 64
"""Rows from which a matrix is made whole first: fewer are those of generation."""


class FourBitLinear(bnb.nn.Linear4bit):
    """bitsandbytes' map, that answers in the dtype of computation whatever its input's.

    Without that, a norm's fp32 output under autocast would make the whole residual stream fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        x = x if x.dtype is self.compute_dtype else x.to(self.compute_dtype)
        if x.numel() < MANY * x.shape[-1]:
            out: Tensor = super().forward(x)
            return out
        fix_4bit_weight_quant_state_from_module(self)
        weight: Any = self.weight
        out = _Product.apply(x, weight, weight.quant_state, self.bias)
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        # Frozen, and thus not among the saved tensors, each of which costs a layer that is recomputed two calls into Python.
        ctx.weight, ctx.state = weight, state
        return torch.nn.functional.linear(x, _whole(weight, state, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad = upstream[0]
        return grad @ _whole(ctx.weight, ctx.state, grad.dtype), None, None, None


def _whole(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in]."""
    if not (dequantised is not None and weight.is_cuda and _is_known(state)):
        whole: Tensor = bnb.functional.dequantize_4bit(weight, state)
        return whole.to(dtype)
    packed = Packed(weight, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset)
    return dequantised(packed, torch.empty(state.shape, dtype=dtype, device=weight.device))


def _is_known(state: Any) -> bool:
    """Whether it is packed as `Packed` says."""
    return bool(state.nested and state.blocksize == BLOCK and state.state2.blocksize == COARSE and state.shape[1] % BLOCK == 0)
