"""What the kernels compute, in plain torch; differentiable."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up (Shazeer 2020, arXiv:2002.05202), in the inputs' dtype, computed in fp32 at least."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """½ z (1 + tanh(√(2/π) (z + 0.044715 z³))), z = x + bias (Hendrycks and Gimpel 2016, arXiv:1606.08415); in x's dtype.

    Args:
        x: [..., width]
        bias: [width]
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.gelu(wide if bias is None else wide + bias, approximate="tanh").to(x.dtype)
