"""Weights beside the weights: averages of what is trained, and the slow weights that Lookahead returns to."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from elite.optimizations.hooks import Hook

Update = Callable[[Any, Any, Any], None]
"""Moves averages towards weights, given how many they are averages of."""


@contextmanager
def swapped(weights: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """Within, each of `weights` holds the values of the other, and the other way round. One at a time is copied."""
    _swap(weights, others)
    try:
        yield
    finally:
        _swap(weights, others)


@torch.no_grad()
def _swap(weights: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for weight, other in zip(weights, others, strict=True):
        # In place, so that whoever keeps a copy of a weight sees that it has changed.
        kept = weight.clone()
        weight.copy_(other)
        other.copy_(kept)


class Average(Hook):
    """An average of what is trained, by torch's AveragedModel; it is what is validated and exported once it exists."""

    def __init__(self, name: str, parameters: Sequence[nn.Parameter], update: Update) -> None:
        self.name = name
        self._trained = nn.ParameterList(parameters)
        self._averaged = AveragedModel(self._trained, multi_avg_fn=update)
        self._averaged.requires_grad_(False)

    @property
    def members(self) -> int:
        """Weights that the average is of."""
        return int(self._averaged.n_averaged)

    def take(self) -> None:
        """Take the present weights in."""
        self._averaged.update_parameters(self._trained)

    def evaluating(self) -> AbstractContextManager[None]:
        if self.members == 0:
            return nullcontext()
        return swapped(list(self._trained), list(self._averaged.parameters()))

    def state(self) -> dict[str, Any]:
        return {"averaged": self._averaged.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._averaged.load_state_dict(state["averaged"])


class ExponentialAverage(Average):
    """Begins with the weights as they are; its first member.

    Args:
        decay: share of the average that stays at a step.
        warmup: less stays in the first steps.
    """

    def __init__(self, name: str, parameters: Sequence[nn.Parameter], decay: float, warmup: bool) -> None:
        def update(averaged: list[Tensor], weights: list[Tensor], members: Tensor) -> None:
            get_ema_multi_avg_fn(self.decay(self.members))(averaged, weights, members)

        super().__init__(name, parameters, update)
        self._decay, self._warmup = decay, warmup
        self.take()

    def decay(self, members: int) -> float:
        """At the step that takes the member after so many."""
        return min(self._decay, (1 + members) / (10 + members)) if self._warmup else self._decay

    def stepped(self, step: int) -> None:
        self.take()

    def exports(self) -> str:
        return "the exponential moving average of the weights"

    def counts(self) -> dict[str, float]:
        return {"updates": self.members - 1, "last_decay": self.decay(self.members - 1)}


class RunningMean(Average):
    """The mean of the weights after step `first` and every `every` steps from there.

    Args:
        rate: learning rate from there on, of the first parameter group; None leaves it to the schedule.
        anneal: steps in which it gets there.
    """

    def __init__(
        self,
        name: str,
        parameters: Sequence[nn.Parameter],
        first: int,
        every: int,
        optimizer: torch.optim.Optimizer,
        rate: float | None,
        anneal: int,
    ) -> None:
        super().__init__(name, parameters, get_swa_multi_avg_fn())
        self._first, self._every, self._optimizer, self._rate, self._anneal = first, every, optimizer, rate, anneal
        self._annealing: SWALR | None = None

    def sets_rate(self, step: int) -> bool:
        return self._rate is not None and step >= self._first

    def stepped(self, step: int) -> None:
        if step < self._first:
            return
        if self._rate is not None:
            self._annealing = self._annealing or self._begin(self._rate)
            self._annealing.step()
        if (step - self._first) % self._every == 0:
            self.take()

    def _begin(self, rate: float) -> SWALR:
        groups = self._optimizer.param_groups
        rates = [rate * group["initial_lr"] / groups[0]["initial_lr"] for group in groups]
        return SWALR(self._optimizer, rates, self._anneal)  # type: ignore[arg-type]

    def exports(self) -> str:
        return f"the mean of the weights after {self.members} steps" if self.members else ""

    def state(self) -> dict[str, Any]:
        return super().state() | {"annealing": self._annealing.state_dict() if self._annealing else None}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        # A run that goes back may have begun it since.
        self._annealing = None
        if state["annealing"] is not None:
            assert self._rate is not None
            self._annealing = self._begin(self._rate)
            self._annealing.load_state_dict(state["annealing"])

    def counts(self) -> dict[str, float]:
        return {"averaged": self.members}


class SlowWeights(Hook):
    """Lookahead's slow weights: every `k` steps, and after the last, they go `alpha` of the way to the weights, which go to them."""

    def __init__(self, name: str, parameters: Sequence[nn.Parameter], k: int, alpha: float, steps: int) -> None:
        self.name = name
        self._fast = list(parameters)
        self._slow = [parameter.detach().clone() for parameter in parameters]
        self._k, self._alpha, self._steps = k, alpha, steps
        self._returns = 0

    @torch.no_grad()
    def stepped(self, step: int) -> None:
        if step % self._k and step != self._steps:
            return
        for fast, slow in zip(self._fast, self._slow, strict=True):
            slow.lerp_(fast, self._alpha)
            fast.copy_(slow)
        self._returns += 1

    def evaluating(self) -> AbstractContextManager[None]:
        return swapped(self._fast, self._slow)

    def exports(self) -> str:
        return "Lookahead's slow weights"

    def state(self) -> dict[str, Any]:
        return {"slow": self._slow, "returns": self._returns}

    def load_state(self, state: dict[str, Any]) -> None:
        for slow, saved in zip(self._slow, state["slow"], strict=True):
            slow.copy_(saved)
        self._returns = state["returns"]

    def counts(self) -> dict[str, float]:
        return {"returns": self._returns}
