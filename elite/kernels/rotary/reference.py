"""What the kernel computes, in plain torch; differentiable, and not in place."""

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions' angles (Su et al. 2021, arXiv:2104.09864), in their own dtypes.

    The first R values (a, b) of a head, in halves, become (a cos − b sin, b cos + a sin); the others stay. Computed in fp32 (fp64 for
    fp64).

    Args:
        q: [B, S, H, D]
        k: [B, S, K, D]
        cos, sin: [B or 1, S, R], R even and at most D; both halves alike.
    """
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    width = cos.shape[-1]
    wide = x[..., :width].to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide.chunk(2, -1)
    c, s = (t.to(wide.dtype)[:, :, None] for t in (cos, sin))
    turned = wide * c + torch.cat([-b, a], -1) * s
    return torch.cat([turned.to(x.dtype), x[..., width:]], -1)
