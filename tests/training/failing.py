"""A step that runs out of memory going back."""

from typing import Any

import torch
from torch import Tensor


class Fails(torch.autograd.Function):
    """The identity, whose gradient there is no memory for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("all of it")
