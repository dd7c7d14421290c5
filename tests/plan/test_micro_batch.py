"""The largest micro-batch by arithmetic, and the accumulation that keeps the global batch."""

from dataclasses import replace

import pytest

from elite.compose import from_overrides
from elite.config import AUTO, Executor, RunConfig
from elite.errors import ConfigError, PlanError
from elite.facts import GIB, Device
from elite.geometry import shape
from elite.plan import make_plan
from elite.plan.batch import accumulation_for, with_micro_batch
from elite.plan.executors import choose_executor
from elite.plan.micro_batch import largest_micro_batch
from elite.plan.words import duration
from elite.scaling import LrScaling
from tests.plan.helpers import CORPUS, device, phi2, run_config


def wanted(tokens: int, micro_batch: int | str = AUTO, executor: Executor = Executor.whole) -> RunConfig:
    config = run_config(4096, executor=executor)
    return replace(config, training=replace(config.training, micro_batch=micro_batch, global_batch_tokens=tokens))


@pytest.mark.parametrize("sequences", [1, 2, 12, 16, 17, 60])
def test_accumulation_keeps_the_global_batch(sequences: int) -> None:
    for largest in range(1, sequences + 3):
        found = accumulation_for(sequences, largest)
        size, rest = divmod(sequences, found)
        assert rest == 0 and size <= largest
        assert not any(sequences % fewer == 0 and sequences // fewer <= largest for fewer in range(1, found))


@pytest.mark.parametrize("gib", [14, 24, 40])
@pytest.mark.parametrize("executor", [Executor.whole, Executor.auto])
def test_the_largest_fits_and_the_next_does_not(gib: int, executor: Executor) -> None:
    config, machine = wanted(2**20, executor=executor), replace(device("h100"), memory_usable_bytes=gib * GIB)
    found = largest_micro_batch(config, machine, phi2())
    fixed = wanted(2**20, executor=choose_executor(with_micro_batch(config, 1), machine, phi2(), 1).executor)
    fits = [choose_executor(with_micro_batch(fixed, n), machine, phi2(), 1).fits for n in range(1, found + 2)]
    assert all(fits[:-1]) and (fixed.executor.name is Executor.streamed or not fits[-1])


def made(config: RunConfig, machine: Device | None = None) -> tuple[int, int, int, int | None]:
    plan = make_plan(config, machine or device("rtx3090"), phi2(), CORPUS)
    return plan.micro_batch, plan.accumulation, plan.step_tokens, plan.largest_micro_batch


def test_a_plan_settles_auto_and_keeps_the_tokens_of_a_step() -> None:
    size, accumulation, tokens, largest = made(wanted(262144))
    assert largest is not None and size <= largest < 64 and size * accumulation * 4096 == tokens == 262144
    assert made(wanted(262144, size)) == (size, accumulation, tokens, None)
    two = made(wanted(262144), replace(device("rtx3090"), count=2))
    assert two[0] * two[1] * 4096 * 2 == two[2] == 262144


def test_no_more_than_the_global_batch_has() -> None:
    assert made(wanted(8192), device("h200"))[:2] == (2, 1)
    # Where not even one sequence fits, one is what the plan shows.
    assert made(wanted(8192), replace(device("rtx3090"), memory_usable_bytes=GIB))[0] == 1


def test_bad_values() -> None:
    for value in ("nine", 0, -1):
        with pytest.raises(ConfigError, match="must be a positive whole number or auto"):
            made(wanted(8192, value))
    with pytest.raises(PlanError, match="not a multiple"):
        made(wanted(10000))


def test_the_learning_rate_follows_the_tokens_that_a_step_really_has() -> None:
    config = wanted(4 * 65536)
    scaled = replace(config, training=replace(config.training, lr_scaling=LrScaling.sqrt))
    rates = [make_plan(one, device("rtx3090"), phi2(), CORPUS).learning_rate for one in (config, scaled)]
    assert rates == pytest.approx([2e-4, 4e-4])


def test_a_step_of_many_short_passes_is_spoken_of() -> None:
    """With what the plan itself says of the larger ones; not where it would bring nothing or is asked for already."""

    def advice(config: RunConfig, machine: str) -> list[str]:
        return [one for one in make_plan(config, device(machine), shape(config.model), CORPUS).warnings if "sequences a pass" in one]

    small = from_overrides("model=smollm2_135m", "tier=tier1", "executor=whole").config
    steps = [make_plan(with_micro_batch(small, n), device("h100"), shape(small.model), CORPUS).step_s for n in (1, 4)]
    now, then = (duration(step) for step in steps)
    assert steps[1] < steps[0] / 2
    assert advice(small, "h100") == [f"4 sequences a pass instead of 1: {then} a step instead of {now}: training.micro_batch=auto"]
    long = replace(small, tier=replace(small.tier, context=65536))
    assert not any(advice(config, "h100") for config in (long, with_micro_batch(small, 4), with_micro_batch(small, 16)))
    assert not advice(small, "cpu")
