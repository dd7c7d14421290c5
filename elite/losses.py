"""The last linear map and the cross-entropy as one function: logits never exist whole, and their gradients come with the forward.

Symbols: T tokens, d hidden size, V vocabulary. For a scored token with logits z = W h + b, label y and smoothing ε,

    loss = lse(z) − (1 − ε) z_y − ε mean(z) + ζ lse(z)²        ∂loss/∂z = (1 + 2ζ lse(z)) softmax(z) − (1 − ε) onehot(y) − ε / V

so a tile of tokens needs its logits once: they become their own gradient in place, and the gradients of h, W and b follow while the
tile is there. Source: Hsu et al. 2024, arXiv:2410.10989 (Liger); label smoothing after Szegedy et al. 2016, arXiv:1512.00567;
the z-loss ζ lse² after Chowdhery et al. 2022, arXiv:2204.02311.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_BYTES = 1024**3
"""fp32 logits at once, at most: matrix products of fewer tokens run slower."""
ALIGNMENT = 128
"""Tiles of more tokens than this are a multiple of it, as matrix kernels like."""


def tile_tokens(vocab_size: int, most_bytes: int = TILE_BYTES) -> int:
    """Tokens whose fp32 logits fit into so many bytes; at least one."""
    tokens = max(1, most_bytes // (4 * vocab_size))
    return tokens if tokens < ALIGNMENT else tokens - tokens % ALIGNMENT


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    tile: int = 0,
) -> Tensor:
    """Sum of the token losses of `F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")`, in nats.

    Gradients are formed in the forward pass, for those of hidden, weight and bias that want one; the backward multiplies by the
    upstream factor. Matrix products run in autocast's dtype where it is on, else in that of `weight`; softmax and sums in fp32
    (fp64 for fp64 weights). Nothing waits for the device.

    Args:
        hidden: [T, d].
        weight: [V, d].
        bias: [V].
        labels: [T], int64, already shifted.
        ignore_index: label of tokens that are not scored.
        label_smoothing: ε, 0 to 1.
        z_loss: ζ, not negative.
        tile: tokens at once; 0 takes as many as `TILE_BYTES` of logits allow.

    Returns:
        Scalar, fp32 (fp64 for fp64 weights).
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    tile = tile or tile_tokens(weight.shape[0])
    # Inside a Function gradients are always off, so whether the caller wants any is asked here.
    options = _Options(dtype, ignore_index, label_smoothing, z_loss, tile, torch.is_grad_enabled())
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, options)
    return loss


class _Options:
    """What is not a tensor."""

    def __init__(self, dtype: torch.dtype, ignore_index: int, smoothing: float, z_loss: float, tile: int, gradients: bool) -> None:
        self.dtype = dtype
        self.accumulate = torch.promote_types(dtype, torch.float32)
        self.ignore_index, self.smoothing, self.z_loss, self.tile, self.gradients = ignore_index, smoothing, z_loss, tile, gradients


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: _Options) -> Tensor:
        wanted = [options.gradients and need for need in ctx.needs_input_grad[:3]]
        wide = options.accumulate
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        matrix = weight.to(options.dtype)
        offset = None if bias is None else bias.to(options.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], options.tile):
            rows = slice(start, start + options.tile)
            part = hidden[rows].to(options.dtype)
            logits = F.linear(part, matrix, offset)
            losses = _cross_entropy(logits)(logits, labels[rows], options.ignore_index, options.smoothing, any(wanted), options.z_loss)
            total += losses.sum()
            if not any(wanted):
                continue
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=wide)
            if grad_hidden is not None:
                grad_hidden[rows] = logits @ matrix
            if grad_weight is not None:
                _add_product(grad_weight, logits.mT, part)
            del logits
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes, ctx.tile = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype), options.tile
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if gradient is None else _scaled(gradient, upstream[0], dtype, ctx.tile)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None


def _cross_entropy(logits: Tensor) -> Any:
    """The kernel, or on a CPU and in fp64 what it computes."""
    if logits.is_cuda and logits.dtype is not torch.float64:
        from elite.kernels.cross_entropy.kernel import cross_entropy
    else:
        from elite.kernels.cross_entropy.reference import cross_entropy
    return cross_entropy


def _add_product(total: Tensor, one: Tensor, two: Tensor) -> None:
    """total += one · two, for a total in fp32 and half factors without rounding to half in between where the library can (CUDA)."""
    if one.dtype == total.dtype:
        total.addmm_(one, two)
    elif total.is_cuda:
        torch.addmm(total, one, two, out_dtype=total.dtype, out=total)
    else:
        total += one @ two


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """`factor` times `gradient`, as `dtype`; row tiles keep the product in fp32 without a whole fp32 copy of a half gradient."""
    if gradient.dtype == factor.dtype == dtype:
        # In place: a head's gradient is as large as the head. A second backward would find it changed, and says so.
        return gradient.mul_(factor)
    out = torch.empty_like(gradient, dtype=dtype)
    if gradient.dtype == factor.dtype:
        # One pass: the product is converted as it is written.
        return torch.mul(gradient, factor, out=out)
    for part, target in zip(gradient.split(rows), out.split(rows), strict=True):
        target.copy_(part.to(factor.dtype) * factor)
    return out
