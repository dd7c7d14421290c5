from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from elite.config import RunConfig
from elite.errors import PlanError
from elite.facts import GIB
from elite.plan import Plan, choose_tier, make_plan, tiers
from tests.plan.helpers import CORPUS, STANDARD, device, phi2, run_config

TIERS = [(f"tier{n}", 4096 * 2 ** (n - 1)) for n in range(11, 0, -1)]
LARGE = replace(device("h200"), memory_usable_bytes=10**15, matmul_flops_per_s=1e18)
PLENTY = replace(CORPUS, train_tokens=10**12)


def named(name: str, context: int) -> RunConfig:
    config = run_config(context, (*STANDARD, "qlora"))
    return replace(config, tier=replace(config.tier, name=name))


def candidates(seen: list[str] | None = None) -> Iterator[tuple[str, RunConfig]]:
    for name, context in TIERS:
        if seen is not None:
            seen.append(name)
        yield name, named(name, context)


def test_the_highest_is_taken_if_nothing_speaks_against_it() -> None:
    seen: list[str] = []
    config, made, reason = choose_tier(candidates(seen), LARGE, phi2(), PLENTY)
    assert (config.tier.name, made.tier, seen) == ("tier11", "tier11", ["tier11"])
    assert reason == "It is the highest tier."


def test_memory_refuses_the_next_higher_tier() -> None:
    config, made, reason = choose_tier(candidates(), device("rtx3090"), phi2(), PLENTY)
    assert made.fits
    assert config.tier.name == "tier3"
    assert reason.startswith("tier4 is refused: it needs ")


def test_a_long_step_refuses_a_tier() -> None:
    slow = replace(LARGE, matmul_flops_per_s=50e12)
    config, made, reason = choose_tier(candidates(), slow, phi2(), PLENTY)
    assert made.step_s <= 30 * 60
    assert "a step takes" in reason
    assert "plan.max_step_minutes=30" in reason
    assert config.tier.name != "tier11"


def test_a_small_corpus_refuses_a_tier() -> None:
    config, _, reason = choose_tier(candidates(), LARGE, phi2(), replace(CORPUS, train_tokens=20 * 16384))
    assert config.tier.name == "tier3"
    assert reason == "tier4 is refused: the corpus gives 10.0 sequences, fewer than plan.min_sequences=20."


def test_the_lowest_that_fits_is_taken_if_every_tier_breaks_a_rule() -> None:
    config, made, reason = choose_tier(candidates(), LARGE, phi2(), replace(CORPUS, train_tokens=5000))
    assert config.tier.name == "tier1"
    assert made.fits
    assert "No tier satisfies every rule" in reason
    assert "the corpus gives 1.2 sequences" in reason
    assert reason.startswith("tier2 is refused")


def test_nothing_fits() -> None:
    tiny = replace(device("rtx2060s"), memory_usable_bytes=GIB)
    with pytest.raises(PlanError, match="no tier fits rtx2060s: tier1 needs .* GiB of 1.00 usable") as caught:
        choose_tier(candidates(), tiny, phi2(), CORPUS)
    assert "linear weights" in caught.value.problem
    assert len(str(caught.value).splitlines()) <= 3


def test_no_candidates() -> None:
    with pytest.raises(PlanError, match="no tier to choose from"):
        choose_tier([], LARGE, phi2(), CORPUS)


def test_all_gpus_together_reach_a_higher_tier() -> None:
    """The sequence is shared where it does not fit on each alone, and only there."""
    config, alone, _ = choose_tier(candidates(), device("rtx3090"), phi2(), PLENTY)
    assert config.tier.name == "tier3"
    config, made, reason = choose_tier(candidates(), replace(device("rtx3090"), count=4), phi2(), PLENTY)
    assert config.tier.name == "tier5" and made.fits and made.step_tokens == made.context
    assert [switch.active for switch in made.decisions if switch.name == "ring_attention"] == [True]
    assert reason.endswith("It fits as 4 ranks share each sequence: optimizations.ring_attention.enabled=true.")
    few, made, _ = choose_tier(candidates(), replace(device("h200"), count=4), phi2(), replace(CORPUS, train_tokens=20 * 4096))
    assert (few.tier.name, made.fits) == ("tier1", True) and not few.optimizations.ring_attention.enabled


def test_on_one_gpu_a_tier_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = list[str]()

    def noted(config: RunConfig, *rest: Any) -> Plan:
        planned.append(config.tier.name)
        return make_plan(config, *rest)

    monkeypatch.setattr(tiers, "make_plan", noted)
    choose_tier(candidates(), device("rtx3090"), phi2(), PLENTY)
    assert planned == [name for name, _ in TIERS][: len(planned)]
    planned.clear()
    choose_tier(candidates(), replace(device("rtx3090"), count=2), phi2(), PLENTY)
    assert planned.count("tier11") == 2
