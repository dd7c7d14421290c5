"""Every optimization has its line, its effect is the plan's, and every two of them are allowed together or refused with a reason."""

from dataclasses import replace
from io import StringIO
from itertools import combinations

import hydra
import pytest
from rich.console import Console

from elite import compose, geometry, modes
from elite.config import CONF_DIR, Executor, RunConfig
from elite.errors import PlanError
from elite.facts import NO_CORPUS
from elite.optimizations import ALL, decide
from elite.optimizations.contract import Optimization
from elite.plan import facts_of, make_plan, render_survey, survey
from elite.plan.switches import conflicts_of
from tests.plan.helpers import STANDARD, device, phi2, run_config, switches

CONTEXT = 16384
PAIRS = list(combinations(ALL, 2))
RIVALS = {("fused_kernels", "liger_kernels"), ("gradient_checkpointing", "checkpoint_offload")}
"""Some that are known to exclude each other, whatever else does."""


def with_parts(config: RunConfig, *names: str) -> RunConfig:
    return replace(config, optimizations=switches(*names))


def acting(*kinds: type[Optimization]) -> set[str]:
    """Of these parts, all on, those that act on a card and a model that nearly all can act on."""
    config = run_config(131072, tuple(kind.name for kind in kinds), "qwen25_coder_1_5b")
    facts = facts_of(config, device("h100"), geometry.shape(config.model), config.executor.name.value)
    return {decision.name for decision in decide(config.optimizations, facts) if decision.active}


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda kind: kind.name)
def test_every_pair_is_allowed_or_refused_with_a_reason(one: type[Optimization], other: type[Optimization]) -> None:
    shared = one.claims & other.claims
    try:
        active = acting(one, other)
    except PlanError as error:
        assert shared and one.name in error.problem and other.name in error.problem
        assert any(site.value in error.problem for site in shared) and ".enabled=false" in error.remedy
        assert len(str(error).splitlines()) <= 3
        assert other in conflicts_of(one) and one in conflicts_of(other)
        return
    assert not {(one.name, other.name), (other.name, one.name)} & RIVALS
    # One place for two is let through only where one of them cannot act.
    assert not shared or len(active) < 2


def test_effects_are_differences_of_plans() -> None:
    machine, shape, config = device("rtx3090"), phi2(), run_config(CONTEXT, (*STANDARD, "fused_loss"))
    now = make_plan(config, machine, shape, NO_CORPUS)
    found = survey(config, machine, shape)
    assert [line.kind for line in found.lines] == list(ALL)
    active = [line.kind.name for line in found.lines if line.active]
    assert active == [switch.name for switch in now.decisions if switch.active] and len(active) > 3
    for line in found.lines:
        if line.effect is None:
            assert line.reason and not line.active
            continue
        names = [name for name in active if name != line.kind.name and name not in line.instead_of]
        other = make_plan(with_parts(config, *names, *([] if line.active else [line.kind.name])), machine, shape, NO_CORPUS)
        sign = -1 if line.active else 1
        assert line.effect.total_bytes == other.total_bytes, line.kind.name
        assert line.effect.memory_bytes == pytest.approx(sign * (other.total_bytes - now.total_bytes))
        assert line.effect.step_s == pytest.approx(sign * (other.step_s - now.step_s))
    effects = {line.kind.name: line.effect for line in found.lines if line.effect is not None}
    # Chen et al. 2016: less memory, more time.
    assert effects["gradient_checkpointing"].memory_bytes < 0 < effects["gradient_checkpointing"].step_s
    assert effects["checkpoint_offload"].host_bytes > 0


def test_under_the_streamed_executor_the_layout_stays() -> None:
    config = run_config(1 << 20, (*STANDARD, "fused_loss"), executor=Executor.auto)
    found = survey(config, device("rtx3090"), phi2())
    assert found.present.executor is Executor.streamed and found.present.layout is not None
    reasons = {line.kind.name: line.reason for line in found.lines}
    assert "streamed executor does this itself" in reasons["flash_attention"]
    qlora = next(line for line in found.lines if line.kind.name == "qlora")
    # Beside what a layer takes, weights of 4 bits instead of 16, whatever else the layout is.
    assert qlora.effect is not None and qlora.effect.memory_bytes + qlora.effect.host_bytes < 0


def test_the_table_shows_everything() -> None:
    out = StringIO()
    found = survey(run_config(CONTEXT), device("rtx3090"), phi2())
    Console(file=out, width=240).print(render_survey(found))
    text = out.getvalue()
    for kind in ALL:
        rows = [line for line in text.splitlines() if f" {kind.name} " in f" {line} "]
        assert len(rows) >= 2 and any(str(kind.row) in line and kind.exactness.value in line for line in rows), kind.name
        assert kind.source in text
    assert "would replace gradient_checkpointing" in text and "active" in text


@pytest.mark.parametrize("tier", ["tier=auto", "tier=tier8"])
def test_the_mode_needs_neither_corpus_nor_gpu(tier: str, capsys: pytest.CaptureFixture[str]) -> None:
    composed = compose.from_overrides("mode=optimizations", "hardware=rtx2060s", "data.repo=/does/not/exist", tier)
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        modes.run(composed)
    shown = capsys.readouterr().out
    assert all(kind.name in shown for kind in ALL) and "rtx2060s" in shown and "excludes" in shown
    assert ("524,288 tokens" in shown) == (tier == "tier=tier8")
