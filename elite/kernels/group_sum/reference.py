"""What the kernel computes, in plain torch."""

import torch
from torch import Tensor


def group_sum(more: Tensor, base: Tensor | None, out: Tensor) -> None:
    """out[m, k] = base[m, k] + Σ_g more[m, k·G + g], added up in fp32 at least.

    Args:
        more: [m, H, D]; the G = H / K heads of a group follow one another.
        base: [m, K, D], zeros where None; may be `out` itself.
        out: [m, K, D]
    """
    total = more.unflatten(1, (out.shape[1], -1)).sum(2, dtype=torch.promote_types(more.dtype, torch.float32))
    out.copy_(total if base is None else total + base)
