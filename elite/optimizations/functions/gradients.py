"""What is done to gradients between the backward and the clipping of all together. A unit is a row of a matrix, or a whole vector."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elite.optimizations.hooks import Hook

SEEDS_A_RUN = 1_000_003
"""Seeds of two runs are so many steps apart."""


class Centralization(Hook):
    """Subtracts from every row of a gradient its mean."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._count = 0

    @torch.no_grad()
    def gradients(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        for gradient in _present(parameters):
            if gradient.ndim > 1:
                gradient.sub_(gradient.mean(dim=tuple(range(1, gradient.ndim)), keepdim=True))
                self._count += 1

    def state(self) -> dict[str, Any]:
        return {"count": self._count}

    def load_state(self, state: dict[str, Any]) -> None:
        self._count = state["count"]

    def counts(self) -> dict[str, float]:
        return {"gradients": self._count}


class AdaptiveClipping(Hook):
    """Shortens units' gradients that are long against the units' weights.

    Args:
        clipping: longest gradient as a share of the weights' length.
        eps: least length that weights count with.
        device: where the count is kept, so that nothing waits for it.
    """

    def __init__(self, name: str, clipping: float, eps: float, device: torch.device) -> None:
        self.name = name
        self._clipping, self._eps = clipping, eps
        self._clipped = torch.zeros((), dtype=torch.int64, device=device)
        self._units = 0

    @torch.no_grad()
    def gradients(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                continue
            length = _lengths(parameter.grad)
            most = self._clipping * _lengths(parameter).clamp_(min=self._eps)
            too_long = length > most
            parameter.grad.mul_(torch.where(too_long, most / length, 1.0))
            self._clipped += too_long.sum()
            self._units += length.numel()

    def state(self) -> dict[str, Any]:
        return {"clipped": int(self._clipped), "units": self._units}

    def load_state(self, state: dict[str, Any]) -> None:
        self._clipped.fill_(state["clipped"])
        self._units = state["units"]

    def counts(self) -> dict[str, float]:
        return {"clipped_units": int(self._clipped), "units": self._units}


class Noise(Hook):
    """Adds Gaussian noise whose variance falls with the steps: η / (1 + t)^γ, t from 0."""

    def __init__(self, name: str, eta: float, gamma: float, seed: int) -> None:
        self.name = name
        self._eta, self._gamma, self._seed = eta, gamma, seed
        self._steps = 0

    @torch.no_grad()
    def gradients(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        for gradient in _present(parameters):
            device = gradient.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(self._seed * SEEDS_A_RUN + step)
            noise = torch.randn(gradient.shape, generator=generators[device], device=device, dtype=gradient.dtype)
            gradient.add_(noise, alpha=self.deviation(step))
        self._steps += 1

    def deviation(self, step: int) -> float:
        """Standard deviation of the noise at a step, counted from 1."""
        return math.sqrt(self._eta / step**self._gamma)

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def load_state(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]

    def counts(self) -> dict[str, float]:
        return {"steps": self._steps, "last_deviation": self.deviation(self._steps) if self._steps else 0.0}


def _present(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _lengths(values: Tensor) -> Tensor:
    """Length of each unit, in a shape that broadcasts over `values`."""
    return torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)) if values.ndim > 1 else None, keepdim=True)
