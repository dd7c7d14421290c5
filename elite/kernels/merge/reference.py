"""What the kernel computes, in plain torch."""

import torch
from torch import Tensor


def merge(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: o [n, H, D] in o_a's dtype and L [H, n].

    o = o_a·σ(L_a − L_b) + o_b·σ(L_b − L_a), L = log(exp L_a + exp L_b); in fp32 (fp64 for fp64).

    Args:
        out: takes o; may be `o_a` itself.
    """
    difference = (lse_a - lse_b).t()[..., None]
    weighted = o_b * torch.sigmoid(-difference)
    o = torch.addcmul(weighted, o_a, torch.sigmoid(difference), out=torch.empty_like(o_a) if out is None else out)
    return o, torch.logaddexp(lse_a, lse_b)
