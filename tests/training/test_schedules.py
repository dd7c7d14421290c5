"""Learning rates against their formulas, and resumed against uninterrupted."""

import json
import math
from collections.abc import Callable

import pytest
import torch

from elite import checkpoint
from elite.config import Schedule, ScheduleConfig
from elite.training.schedules import SCHEDULES, schedule

STEPS, PEAK = 40, 1e-3


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def rates(config: ScheduleConfig, steps: int = STEPS) -> list[float]:
    made = optimizer()
    scheduler = schedule(made, config, steps)
    seen = []
    for step in range(steps):
        seen.append(float(scheduler.get_last_lr()[0]))
        made.step()
        if step < steps - 1:
            scheduler.step()
    return seen


# The share of the peak after `w` warm-up steps, by progress through the rest.
FORMULAS: dict[Schedule, Callable[[float], float]] = {
    Schedule.cosine: lambda p: 0.1 + 0.9 * (1 + math.cos(math.pi * p)) / 2,
    Schedule.linear: lambda p: 1 - p,
    Schedule.polynomial: lambda p: 0.1 + 0.9 * (1 - p) ** 2,
    Schedule.constant: lambda p: 1.0,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_rates_follow_the_formula(name: Schedule) -> None:
    seen = rates(ScheduleConfig(name, warmup_fraction=0.25, final_fraction=0.1, power=2.0))
    for step, rate in enumerate(seen):
        expected = step / 10 if step < 10 else FORMULAS[name]((step - 10) / 30)
        assert rate == pytest.approx(PEAK * expected, rel=1e-6, abs=1e-12), step


def test_wsd_is_flat_between_warm_up_and_decay() -> None:
    seen = rates(ScheduleConfig(Schedule.wsd, warmup_fraction=0.1, decay_fraction=0.25))
    assert seen[4:30] == [PEAK] * 26
    assert seen[0] < PEAK and seen[-1] < 0.1 * PEAK


def test_one_cycle_peaks_where_the_warm_up_ends() -> None:
    seen = rates(ScheduleConfig(Schedule.one_cycle, warmup_fraction=0.3))
    assert seen.index(max(seen)) == 11 and max(seen) == pytest.approx(PEAK)
    assert seen[-1] < seen[0] < PEAK


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_short_runs_work(name: Schedule, steps: int) -> None:
    assert all(0 <= rate <= PEAK for rate in rates(ScheduleConfig(name), steps))


@pytest.mark.parametrize("name", SCHEDULES)
def test_resumed_equals_uninterrupted(name: Schedule) -> None:
    config = ScheduleConfig(name)
    expected = rates(config)
    made = optimizer()
    scheduler = schedule(made, config, STEPS)
    for _ in range(17):
        made.step()
        scheduler.step()
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(checkpoint.flatten({"optimizer": made.state_dict(), "scheduler": scheduler.state_dict()}, tensors))
    state = checkpoint.unflatten(json.loads(text), tensors)
    made = optimizer()
    scheduler = schedule(made, config, STEPS)
    made.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    seen = []
    for _ in range(17, STEPS - 1):
        seen.append(made.param_groups[0]["lr"])
        made.step()
        scheduler.step()
    assert seen == expected[17 : STEPS - 1]
