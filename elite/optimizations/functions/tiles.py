"""A token-wise module in tiles of tokens, each checkpointed."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def tiled(forward: Callable[[Tensor], Tensor], tile: int) -> Callable[[Tensor], Tensor]:
    """`forward` [B, S, d] → [B, S, d] over at most `tile` tokens at once."""

    def run(x: Tensor) -> Tensor:
        if x.shape[0] * x.shape[1] <= tile:
            return forward(x)
        # All rows as one: a tile of several would not lie in one piece, and matrix products would copy it.
        tokens = x.flatten(0, 1).unsqueeze(0)
        parts: list[Tensor] = [checkpoint(forward, part, use_reentrant=False) for part in tokens.split(tile, dim=1)]
        return torch.cat(parts, dim=1).view_as(x)

    return run
