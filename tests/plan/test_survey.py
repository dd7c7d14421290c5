"""The longest context fits and the next one does not; every tier has its line."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console, RenderableType

from elite.config import Executor
from elite.facts import GIB, NO_CORPUS
from elite.plan import longest_contexts, make_plan, render_longest, render_tiers
from elite.plan.batch import with_context
from elite.plan.executors import choose_executor, least_bytes
from elite.plan.survey import STEP
from tests.plan.helpers import STANDARD, device, phi2, run_config


def shown(table: RenderableType) -> str:
    out = StringIO()
    Console(file=out, width=200).print(table)
    return out.getvalue()


@pytest.mark.parametrize("name", ["rtx2060s", "rtx3090", "h100"])
def test_the_longest_context_fits_and_no_longer_one(name: str) -> None:
    config, machine, shape = run_config(on=(*STANDARD, "fused_loss"), executor=Executor.auto), device(name), phi2()
    whole, streamed = longest_contexts(config, machine, shape)
    assert (whole.executor, streamed.executor) == (Executor.whole, Executor.streamed)
    assert 0 < whole.tokens < streamed.tokens
    for line in (whole, streamed):
        alone = replace(config, executor=replace(config.executor, name=line.executor))
        assert line.tokens % STEP == 0 and line.prediction is not None and line.prediction.fits
        expected = choose_executor(with_context(alone, line.tokens), machine, shape, 1)
        assert (line.prediction.estimate, line.prediction.layout) == (expected.estimate, expected.layout)
        assert not choose_executor(with_context(alone, line.tokens + STEP), machine, shape, 1).fits
        # Bisection finds the border only if nothing shorter fails.
        for tokens in range(STEP, line.tokens, max(STEP, line.tokens // 7 // STEP * STEP)):
            assert choose_executor(with_context(alone, tokens), machine, shape, 1).fits, tokens
    text = shown(render_longest((whole, streamed), machine, "phi2"))
    assert f"{whole.tokens:,}" in text and f"{streamed.tokens:,}" in text and "not in this machine" in text


def test_models_that_cannot_be_streamed_have_one_line() -> None:
    config, shape = run_config(executor=Executor.auto), replace(phi2(), unstreamable="it caps its scores")
    assert [line.executor for line in longest_contexts(config, device("rtx3090"), shape)] == [Executor.whole]


def test_nothing_fits_a_card_without_memory() -> None:
    config, machine = run_config(executor=Executor.auto), replace(device("rtx2060s"), memory_usable_bytes=GIB // 2)
    for line in longest_contexts(config, machine, phi2()):
        assert line.tokens == 0 and line.prediction is None and line.least_bytes > GIB // 2
    assert shown(render_longest(longest_contexts(config, machine, phi2()), machine, "phi2")).count("none") == 2


def test_every_tier_says_what_it_takes_at_least() -> None:
    machine, plans = device("rtx3090"), []
    for context in (4096, 2**20, 2**23):
        config = run_config(context, executor=Executor.auto)
        least = least_bytes(config, machine, phi2())
        made = make_plan(config, machine, phi2(), NO_CORPUS)
        assert least <= made.total_bytes
        plans.append((made, least))
    text = shown(render_tiers(plans, machine))
    assert text.count("yes") == sum(made.fits for made, _ in plans) and plans[-1][0].fix in " ".join(text.split())
    assert all(f"{made.context:,}" in text for made, _ in plans)
