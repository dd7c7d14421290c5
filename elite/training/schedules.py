"""Learning-rate schedules, each by the library that has it; a pure function of the step, so they resume exactly."""

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from elite.config import Schedule, ScheduleConfig


def _one_cycle(optimizer: Optimizer, config: ScheduleConfig, warmup: int, steps: int) -> LRScheduler:
    total = max(steps, 2)
    # torch divides by (first phase's steps - 1): keep that above zero in very short runs.
    share = min(1.0, max(config.warmup_fraction, 1.5 / total))
    rates = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=rates, total_steps=total, pct_start=share)


def _cosine(optimizer: Optimizer, config: ScheduleConfig, warmup: int, steps: int) -> Any:
    return get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=config.final_fraction)


def _linear(optimizer: Optimizer, config: ScheduleConfig, warmup: int, steps: int) -> Any:
    return get_linear_schedule_with_warmup(optimizer, warmup, steps)


def _polynomial(optimizer: Optimizer, config: ScheduleConfig, warmup: int, steps: int) -> Any:
    end = config.final_fraction * optimizer.param_groups[0]["lr"]
    return get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=end, power=config.power)


def _wsd(optimizer: Optimizer, config: ScheduleConfig, warmup: int, steps: int) -> Any:
    decay = max(1, round(config.decay_fraction * steps))
    return get_wsd_schedule(
        optimizer, num_warmup_steps=warmup, num_decay_steps=decay, num_training_steps=steps, min_lr_ratio=config.final_fraction
    )


def _constant(optimizer: Optimizer, config: ScheduleConfig, warmup: int, steps: int) -> Any:
    return get_constant_schedule_with_warmup(optimizer, warmup)


SCHEDULES: dict[Schedule, Callable[[Optimizer, ScheduleConfig, int, int], LRScheduler]] = {
    Schedule.one_cycle: _one_cycle,
    Schedule.cosine: _cosine,
    Schedule.linear: _linear,
    Schedule.polynomial: _polynomial,
    Schedule.wsd: _wsd,
    Schedule.constant: _constant,
}


def schedule(optimizer: Optimizer, config: ScheduleConfig, steps: int) -> LRScheduler:
    """The schedule named in `config` over `steps` optimizer steps."""
    return SCHEDULES[config.name](optimizer, config, round(config.warmup_fraction * steps), steps)
