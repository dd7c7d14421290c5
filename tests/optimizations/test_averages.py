"""Averages of the weights and Lookahead against their recurrences, written out plainly."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elite.errors import PlanError
from elite.model import apply_stage
from elite.optimizations.contract import Decision, Stage
from elite.optimizations.hooks import Hook
from elite.optimizations.targets import LoopBuild
from tests.optimizations.test_all import BY_NAME


class Walk:
    """Two parameters that an optimizer moves by drawn gradients, and the hook of one optimization beside them."""

    def __init__(self, name: str, steps: int, begin: float = 0.1, **options: Any) -> None:
        torch.manual_seed(1)
        self.parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
        groups = [{"params": [self.parameters[0]], "lr": begin}, {"params": [self.parameters[1]], "lr": 2 * begin}]
        self.optimizer = torch.optim.SGD(groups, lr=begin)
        # As the run's schedule does, it notes initial rates.
        torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        kind = BY_NAME[name]
        optimization = kind(kind.Config(enabled=True, **options))
        build = LoopBuild(None, self.optimizer, self.parameters, steps, steps, 0, torch.device("cpu"), lambda: 0.0)
        self.count = apply_stage(Stage.loop, (Decision(optimization, True, True, ""),), build)[name].count
        self.hook: Hook = build.hooks[0]
        self.steps = steps
        self.before = self.now()

    def now(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def __iter__(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Each step's number and the weights that the optimizer leaves, before the hook acts."""
        for step in range(1, self.steps + 1):
            for parameter in self.parameters:
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            self.optimizer.step()
            yield step, self.now()
            self.hook.stepped(step)

    def evaluated(self) -> list[Tensor]:
        with self.hook.evaluating():
            return self.now()


def close(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_is_the_recurrence(warmup: bool) -> None:
    walk = Walk("ema", 40, decay=0.8, warmup=warmup)
    average = walk.before
    for step, weights in walk:
        decay = min(0.8, (1 + step) / (10 + step)) if warmup else 0.8
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    assert close(walk.evaluated(), average) and not close(walk.now(), average)
    assert walk.hook.counts() == {"updates": 40, "last_decay": 0.8}


def test_swa_is_the_mean_of_the_weights_that_count() -> None:
    walk = Walk("swa", 20, start=0.5, every=3)
    members = []
    for step, weights in walk:
        assert walk.hook.sets_rate(step) is False
        if step in (10, 13, 16, 19):
            members.append(weights)
        if step < 10:
            assert close(walk.evaluated(), walk.now()), "no mean yet"
    assert close(walk.evaluated(), [torch.stack(values).mean(0) for values in zip(*members, strict=True)])
    assert walk.count == 4 and walk.hook.counts() == {"averaged": 4} and "4 steps" in walk.hook.exports()


def test_swa_anneals_every_group_to_its_rate() -> None:
    walk = Walk("swa", 20, begin=0.1, start=0.5, rate=0.02, anneal=4)
    seen = []
    for step, _ in walk:
        assert walk.hook.sets_rate(step) is (step >= 10)
        seen.append([group["lr"] for group in walk.optimizer.param_groups])
    for position, (one, two) in enumerate(seen):
        share = (1 - math.cos(math.pi * min(1, max(0, position - 9) / 4))) / 2
        assert one == pytest.approx(0.02 * share + 0.1 * (1 - share)) and two == pytest.approx(2 * one)


def test_a_mean_of_one_is_refused() -> None:
    with pytest.raises(PlanError, match="found nothing to act on .weights averaged from step 4 of 4"):
        Walk("swa", 4, start=0.9)


def test_lookahead_is_zhangs_algorithm() -> None:
    walk = Walk("lookahead", 11, k=4, alpha=0.3)
    torch.manual_seed(1)
    fast = [torch.randn(3, 4), torch.randn(5)]
    slow = [value.clone() for value in fast]
    for step, _ in walk:
        for value, rate in zip(fast, (0.1, 0.2), strict=True):
            value -= rate * torch.randn(value.shape, generator=torch.Generator().manual_seed(step))
        if step in (4, 8, 11):  # the last one too
            slow = [s + 0.3 * (f - s) for s, f in zip(slow, fast, strict=True)]
            fast = [value.clone() for value in slow]
        if step == 7:
            assert close(walk.now(), fast) and close(walk.evaluated(), slow) and not close(fast, slow)
    assert close(walk.now(), fast) and close(walk.evaluated(), slow)
    assert walk.hook.counts() == {"returns": 3}


@pytest.mark.parametrize("name", ["ema", "swa", "lookahead"])
def test_evaluating_puts_the_weights_back_bit_for_bit(name: str) -> None:
    walk = Walk(name, 8)
    for _ in walk:
        pass
    before, versions = walk.now(), [parameter._version for parameter in walk.parameters]
    with walk.hook.evaluating():
        # Copies made of a weight (fused LoRA keeps some) are known by its version.
        assert all(p._version > version for p, version in zip(walk.parameters, versions, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(before, walk.now(), strict=True))
    with pytest.raises(ValueError, match="stop"), walk.hook.evaluating():
        raise ValueError("stop")
    assert all(torch.equal(one, two) for one, two in zip(before, walk.now(), strict=True))
