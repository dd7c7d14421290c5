"""Linear maps whose frozen weights are packed in four bits.

bitsandbytes packs them and computes with them where nothing is trained. In training it makes each matrix whole in several operations of
its own, each dispatched in Python, forward and backward; here one kernel does (elite/kernels/dequantise), bit for bit the same.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elite.kernels.dequantise.reference import BLOCK, COARSE, Packed


class FourBitLinear(bnb.nn.Linear4bit):
    """bitsandbytes' map, that answers in the dtype of computation whatever its input's.

    Without that, a norm's fp32 output under autocast would make the whole residual stream fp32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        x = x if x.dtype is self.compute_dtype else x.to(self.compute_dtype)
        weight: Any = self.weight
        state = weight.quant_state
        if not (torch.is_grad_enabled() and x.is_cuda and _has_kernel() and _is_known(state)):
            out: Tensor = super().forward(x)
            return out
        out = _FourBitProduct.apply(x, weight, state, self.bias)
        return out


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        # Frozen, and thus not among the saved tensors, each of which costs a layer that is recomputed two calls into Python.
        ctx.weight, ctx.state = weight, state
        rows, whole = x.flatten(0, -2), _whole(weight, state, x.dtype).mT
        out = rows @ whole if bias is None else torch.addmm(bias.to(x.dtype), rows, whole)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad = upstream[0]
        whole = _whole(ctx.weight, ctx.state, grad.dtype)
        return (grad.flatten(0, -2) @ whole).view(*grad.shape[:-1], -1), None, None, None


def _whole(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in]."""
    from elite.kernels.dequantise.kernel import dequantised

    packed = Packed(weight, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset)
    return dequantised(packed, torch.empty(state.shape, dtype=dtype, device=weight.device))


@cache
def _has_kernel() -> bool:
    return find_spec("triton") is not None


def _is_known(state: Any) -> bool:
    """Whether it is packed as `Packed` says."""
    return bool(state.nested and state.blocksize == BLOCK and state.state2.blocksize == COARSE and state.shape[1] % BLOCK == 0)
