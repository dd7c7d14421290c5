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

from elite.config import ScheduleConfig
from elite.errors import ConfigError


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


SCHEDULES: dict[str, Callable[[Optimizer, ScheduleConfig, int, int], LRScheduler]] = {
    "one_cycle": _one_cycle,
    "cosine": _cosine,
    "linear": _linear,
    "polynomial": _polynomial,
    "wsd": _wsd,
    "constant": _constant,
}


def schedule(optimizer: Optimizer, config: ScheduleConfig, steps: int) -> LRScheduler:
    """The schedule named in `config` over `steps` optimizer steps.

    Raises:
        ConfigError: no such schedule.
    """
    if config.name not in SCHEDULES:
        raise ConfigError(f"schedule.name={config.name} is unknown", f"one of {', '.join(SCHEDULES)}")
    return SCHEDULES[config.name](optimizer, config, round(config.warmup_fraction * steps), steps)
