"""What the kernel computes, in plain torch; differentiable.

    h = x + residual        x̂ = (h − μ) / sqrt(σ² + ε), σ² the mean of (h − μ)²        y = x̂ w + b

μ is the mean over the width for a layer norm (Ba et al. 2016, arXiv:1607.06450), 0 for a root-mean-square norm (Zhang and Sennrich 2019,
arXiv:1910.07467).
"""

import torch
from torch import Tensor


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    center: bool,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """y in x's dtype and h in that of the sum; computed in fp32 (fp64 for fp64).

    Args:
        x, residual: [..., width]
        weight, bias: [width]
        center: whether the mean is taken off.
        dtype: of y, where it is not x's.
    """
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
    return (y if bias is None else y + bias).to(dtype or x.dtype), h
