"""What the kernel computes, in plain torch; differentiable. Its dropout draws other values than the kernel's."""

import torch
import torch.nn.functional as F
from torch import Tensor


def add_dropped(residual: Tensor, parts: tuple[Tensor, ...], p: float) -> Tensor:
    """residual + Σ dropout(part, p) in residual's dtype, added in fp32 at least (Srivastava et al. 2014).

    Args:
        residual, parts: of one shape.
        p: probability that a value is dropped, 0 to 1; kept ones are divided by 1 − p. 0 drops nothing.
    """
    wide = torch.promote_types(residual.dtype, torch.float32)
    total = residual.to(wide)
    for part in parts:
        total = total + F.dropout(part.to(wide), p)
    return total.to(residual.dtype)
