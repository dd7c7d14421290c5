"""A token-wise module in tiles of tokens, each checkpointed."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def tiled(forward: Callable[[Tensor], Tensor], tile: int) -> Callable[[Tensor], Tensor]:
    """`forward` [B, S, d] → [B, S, d] over at most `tile` tokens at once (at least one of every row)."""

    def run(x: Tensor) -> Tensor:
        columns = max(1, tile // x.shape[0])
        if x.shape[1] <= columns:
            return forward(x)
        parts: list[Tensor] = [checkpoint(forward, part, use_reentrant=False) for part in x.split(columns, dim=1)]
        return torch.cat(parts, dim=1)

    return run
