"""The last linear map and the cross-entropy as one function: logits never exist whole, and their gradients come with the forward.

Symbols: T tokens, d hidden size, V vocabulary. For a scored token with logits z = W h + b, label y and smoothing ε,

    loss = lse(z) − (1 − ε) z_y − ε mean(z) + ζ lse(z)²        ∂loss/∂z = (1 + 2ζ lse(z)) softmax(z) − (1 − ε) onehot(y) − ε / V

A head that trains goes by tiles of tokens, whose logits become their own gradient in place; the gradients of h, W and b follow while the
tile is there. A frozen head, whose own gradient nobody wants, goes by tiles of the vocabulary besides: of each token it keeps the largest
logit m, Σ exp(z − m) and Σ exp(z_v − m) W_v, of which loss and gradient are made at the end (elite/kernels/running_loss). So logits
need the same memory however long the vocabulary is, and as many matrix products.

Source: Hsu et al. 2024, arXiv:2410.10989 (Liger); running sums as in attention (Dao et al. 2022, arXiv:2205.14135); label smoothing after
Szegedy et al. 2016, arXiv:1512.00567; the z-loss ζ lse² after Chowdhery et al. 2022, arXiv:2204.02311.
"""

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from elite.kernels.running_loss import reference
from elite.loss_tiles import frozen_tile, tile_tokens


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
        tile: tokens at once; 0: see elite/loss_tiles.py.

    Returns:
        Scalar, fp32 (fp64 for fp64 weights).
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
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
        ctx.dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
        if not any(wanted[1:]):
            total, grad_hidden = _frozen(hidden, weight, bias, labels, options, wanted[0])
            ctx.save_for_backward(grad_hidden, None, None)
            return total
        wide = options.accumulate
        tile = options.tile or tile_tokens(len(weight))
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        matrix = weight.to(options.dtype)
        offset = None if bias is None else bias.to(options.dtype)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], tile):
            rows = slice(start, start + tile)
            part = hidden[rows].to(options.dtype)
            logits = F.linear(part, matrix, offset)
            losses = _cross_entropy(logits)(logits, labels[rows], options.ignore_index, options.smoothing, True, options.z_loss)
            total += losses.sum()
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=wide)
            if grad_hidden is not None:
                grad_hidden[rows] = logits @ matrix
            if grad_weight is not None:
                _add_product(grad_weight, logits.mT, part)
            del logits
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if gradient is None else _scaled(gradient, upstream[0], dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None


def _frozen(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: _Options, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of the losses, and the gradient of `hidden` if it is wanted."""
    (tokens, width), matrix, wide = hidden.shape, weight.to(options.dtype).contiguous(), options.accumulate
    tile, words = frozen_tile(tokens, width if wanted else 1, len(matrix), options.tile)
    logits = torch.empty(tile, words, dtype=options.dtype, device=hidden.device)
    sums = torch.empty(tile, width, dtype=wide, device=hidden.device) if wanted else None
    gradient = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if wanted else None
    mean = matrix.mean(0, dtype=wide) if wanted and options.smoothing else None
    total = torch.zeros((), dtype=wide, device=hidden.device)
    for start in range(0, tokens, tile):
        rows = slice(start, start + tile)
        part = hidden[rows].to(options.dtype)
        kernels, own = _running(part), None if sums is None else sums[: len(part)]
        state = _seen(part, matrix, bias, labels[rows], logits[: len(part)], own, options.smoothing > 0)
        given = (labels[rows], len(matrix), options.ignore_index, options.smoothing, options.z_loss)
        total += kernels.finish(state, *given, own, matrix, mean, None if gradient is None else gradient[rows]).sum()
    return total, gradient


def _seen(part: Tensor, matrix: Tensor, bias: Tensor | None, labels: Tensor, logits: Tensor, sums: Tensor | None, smooth: bool) -> Tensor:
    """The state of the tokens `part` [n, d] after the whole vocabulary, and their sums; `logits` [n, c] holds those of a tile's words."""
    kernels, wide = _running(part), torch.promote_types(part.dtype, torch.float32)
    state = reference.begun(len(part), smooth, wide, part.device)
    for first in range(0, len(matrix), logits.shape[1]):
        some = matrix[first : first + logits.shape[1]]
        offset = None if bias is None else bias[first : first + logits.shape[1]]
        z = torch.mm(part, some.mT, out=logits[:, : len(some)])
        kernels.absorb(z, offset, labels, first, state, sums)
        if sums is not None:
            kernels.add_rows(sums, z, some, first == 0)
    return state


def _running(x: Tensor) -> ModuleType:
    """The kernels of tiles of the vocabulary, or on a CPU and in fp64 what they compute."""
    if x.is_cuda and x.dtype is not torch.float64:
        from elite.kernels.running_loss import kernel

        return kernel
    return reference


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


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`factor` times `gradient`, as `dtype`, in place if it is that already: a head's gradient is as large as the head.

    A second backward would find it changed, and says so. The product is in the wider dtype of both, converted as it is written.
    """
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    # As a vector of one, since a single number would be rounded to the gradient's dtype first.
    return torch.mul(gradient, factor.view(1), out=out)
