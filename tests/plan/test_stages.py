"""Stages of a growing context: where they end, what each takes, and that the plan is that of each stage's own run."""

import json
from dataclasses import replace
from typing import Any

import pytest

from elite.config import Executor, RunConfig
from elite.curriculum import Curriculum, CurriculumConfig
from elite.errors import ConfigError, PlanError
from elite.plan import make_plan
from elite.plan.stages import context_stages
from tests.plan.helpers import CORPUS, STANDARD, device, phi2, run_config
from tests.plan.test_table import text

CONTEXT, STEPS = 16384, 100
GROWING = CurriculumConfig(Curriculum.context)


def growing(config: RunConfig, steps: int = STEPS, **changes: Any) -> RunConfig:
    config = replace(config, curriculum=replace(GROWING, **changes))
    return replace(config, training=replace(config.training, max_steps=steps))


@pytest.mark.parametrize("steps", [3, 10, 97, 1000])
def test_stages_cover_the_run(steps: int) -> None:
    stages = context_stages(growing(run_config(CONTEXT)), steps)
    assert [stage.context for stage in stages] == [CONTEXT // 4, CONTEXT // 2, CONTEXT]
    covered = [step for stage in stages for step in range(stage.first_step, stage.first_step + stage.steps)]
    assert covered == list(range(steps))
    assert all(abs(stage.first_step - share * steps) <= 0.5 for stage, share in zip(stages, (0, 0.3, 0.6), strict=True))
    assert [stage.context for stage in context_stages(run_config(CONTEXT), steps)] == [CONTEXT]


def alone(config: RunConfig, context: int, rows: int) -> RunConfig:
    """The run at one stage's context throughout, with as many tokens a step."""
    config = replace(config, curriculum=CurriculumConfig(), tier=replace(config.tier, context=context, target_length=context // 8))
    return replace(config, training=replace(config.training, micro_batch=rows))


@pytest.mark.parametrize(
    ("executor", "on"), [(Executor.whole, STANDARD), (Executor.whole, ("mixed_precision",)), (Executor.streamed, STANDARD)]
)
def test_each_stage_is_planned_as_a_run_of_its_own(executor: Executor, on: tuple[str, ...]) -> None:
    base, machine, shape = run_config(CONTEXT, on, executor=executor), device("rtx3090"), phi2()
    # All layouts differ in time alone here; held to one, so do the stages.
    base = replace(base, executor=replace(base.executor, chunk=4096, block=16384)) if executor is Executor.streamed else base
    plan = make_plan(growing(base), machine, shape, CORPUS)
    plain = make_plan(growing(base, name=Curriculum.none), machine, shape, CORPUS)
    assert [(s.context, s.micro_batch, s.steps) for s in plan.stages] == [(4096, 4, 30), (8192, 2, 30), (CONTEXT, 1, 40)]
    for stage in plan.stages:
        own = make_plan(alone(growing(base), stage.context, stage.micro_batch), machine, shape, CORPUS)
        assert own.step_tokens == plan.step_tokens and own.accumulation == plan.accumulation
        assert stage.total_bytes == own.total_bytes and stage.step_s == own.step_s and stage.host_bytes == own.host_bytes
        assert stage.tokens_per_s == pytest.approx(plan.step_tokens / own.step_s)
    assert plan.total_bytes == max(stage.total_bytes for stage in plan.stages) == sum(plan.memory.values())
    assert plan.host_bytes == max(stage.host_bytes for stage in plan.stages)
    assert plan.run_s == pytest.approx(sum(stage.steps * stage.step_s for stage in plan.stages)) and plan.run_s < plain.run_s
    assert (plan.steps, plan.step_tokens, plan.step_s) == (plain.steps, plain.step_tokens, plain.step_s)
    assert plan.stages[0].step_s < plan.stages[1].step_s < plan.stages[2].step_s == plan.step_s
    assert plan.epoch_s < plain.epoch_s and json.loads(json.dumps(plan.to_dict())) == plan.to_dict()


def test_epochs_are_as_without_it() -> None:
    config = replace(run_config(CONTEXT), curriculum=GROWING)
    made, plain = (make_plan(c, device("rtx3090"), phi2(), CORPUS) for c in (config, run_config(CONTEXT)))
    assert made.steps == plain.steps == sum(stage.steps for stage in made.stages) > 3


def test_the_plan_says_so() -> None:
    shown = text(make_plan(growing(run_config(CONTEXT)), device("rtx3090"), phi2(), CORPUS), 120)
    assert "context: 0.25 of it until 30% of the steps, 0.5 of it until 60% of the steps, 1 of it to the end" in shown
    for words in ("30 steps of 4,096 tokens × 4", "30 steps of 8,192 tokens × 2", "40 steps of 16,384 tokens × 1"):
        assert words in shown
    assert "of these" not in text(make_plan(run_config(CONTEXT), device("rtx3090"), phi2(), CORPUS), 120)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shares": [0.5, 0.25, 1.0]}, "curriculum.shares="),
        ({"shares": [0.25, 0.5]}, "curriculum.shares="),
        ({"shares": [0.3, 0.5, 1.0]}, "curriculum.shares="),
        ({"shares": [0.0, 0.5, 1.0]}, "curriculum.shares="),
        ({"shares": []}, "curriculum.shares="),
        ({"until": [0.3]}, "curriculum.until="),
        ({"until": [0.6, 0.3]}, "curriculum.until="),
        ({"until": [0.3, 1.0]}, "curriculum.until="),
        ({"start_fraction": 0.0}, "start_fraction=0.0"),
        ({"full_at": 1.5}, "full_at=1.5"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make_plan(growing(run_config(CONTEXT), **changes), device("rtx3090"), phi2(), CORPUS)
    assert len(str(caught.value).splitlines()) <= 3


def test_stages_without_steps_or_rows_are_refused() -> None:
    with pytest.raises(PlanError, match="leaves no step"):
        make_plan(growing(run_config(CONTEXT), steps=1), device("rtx3090"), phi2(), CORPUS)
    with pytest.raises(PlanError, match="is 32 tokens"):
        context_stages(growing(run_config(128)), STEPS)
    thirds = growing(run_config(96 * 8), shares=[1 / 3, 1.0], until=[0.5])
    assert [stage.context for stage in context_stages(thirds, STEPS)] == [256, 768]
