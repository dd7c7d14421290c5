"""Every allowed pair of optimizations, executors and adapters, in as few training runs as hold them all."""

import json
import math
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest

from elite import geometry, hardware
from elite.callbacks import metrics_file
from elite.compose import from_overrides
from elite.config import AdapterMethod
from elite.errors import PlanError
from elite.optimizations import OptimizationsConfig, decide
from elite.plan import facts_of
from tests.conftest import Trained
from tests.covering import Choice, Row, covering_array
from tests.optimizations.test_all import BY_NAME, NEEDS, on

MOST_RUNS = 60
STEPS = 5
CLASS_TOLERANCE = 0.05
"""Nats by which the last loss of so few steps, on other text, may lie above the first."""
TINY = (
    "debug=tiny",
    "optimizations=none",
    "hardware=cpu",
    f"training.max_steps={STEPS}",
    "training.learning_rate=3e-3",
    "training.preflight=false",
    # Smaller matrices keep fp32 state under 8-bit optimizers.
    "adapter.rank=64",
)
OFF, IDLE, ACTIVE = "off", "idle", "active"
"""Idle: asked for where it cannot act, which is no error and has a reason."""
EXECUTORS = ("whole", "streamed")
ADAPTERS = ("lora", "full")
FACTORS = {"executor": EXECUTORS, "adapter": ADAPTERS, **dict.fromkeys(BY_NAME, (OFF, IDLE, ACTIVE))}

MILD: dict[str, dict[str, Any]] = {"gradient_noise": {"eta": 1e-6}}
"""Options with which a loss does not rise over so few steps: the paper's noise is larger than these gradients."""


class Rules:
    """What the program itself says of single parts and of pairs, under each executor and adapter."""

    def __init__(self) -> None:
        self._config = from_overrides(*TINY).config
        self._device, self._shape = hardware.device(self._config.hardware), geometry.shape(self._config.model)
        self._bit: dict[Choice, int] = {
            choice: 1 << place for place, choice in enumerate((name, value) for name, values in FACTORS.items() for value in values)
        }
        self._fits = [self._fitting(executor, adapter) for executor, adapter in product(EXECUTORS, ADAPTERS)]

    def __call__(self, row: Row) -> bool:
        """Whether some executor and adapter let all of a partial row stand."""
        bits = sum(self._bit[choice] for choice in row.items())
        return any(all(bits & ~fits[choice] == 0 for choice in row.items()) for fits in self._fits)

    def _active(self, executor: str, adapter: str, *names: str) -> set[str] | None:
        """Which of these parts act when they alone are on; None where they exclude each other."""
        switched: dict[str, Any] = {name: on(BY_NAME[name]) for name in names}
        options = replace(OptimizationsConfig(), **switched)
        config = replace(self._config, optimizations=options, adapter=replace(self._config.adapter, method=AdapterMethod(adapter)))
        try:
            return {d.name for d in decide(options, facts_of(config, self._device, self._shape, executor)) if d.active}
        except PlanError:
            return None

    def _fitting(self, executor: str, adapter: str) -> dict[Choice, int]:
        """For each choice those, as bits, that may stand beside it."""
        alone = {name: self._active(executor, adapter, name) for name in BY_NAME}
        own = {"executor": {executor}, "adapter": {adapter}}
        own |= {name: {OFF, ACTIVE if found else IDLE} if found is not None else {OFF} for name, found in alone.items()}
        possible = [choice for choice in self._bit if choice[1] in own[choice[0]]]
        fits = dict.fromkeys(self._bit, 0)
        for choice in possible:
            fits[choice] = sum(self._bit[other] for other in possible)
        acting = [name for name, found in alone.items() if found]
        for one, two in combinations(acting, 2):
            if self._active(executor, adapter, one, two) != {one, two}:
                fits[one, ACTIVE] &= ~self._bit[two, ACTIVE]
                fits[two, ACTIVE] &= ~self._bit[one, ACTIVE]
        return fits


@cache
def rows() -> list[Row]:
    return covering_array(FACTORS, Rules())


def overrides(row: Row) -> list[str]:
    words = [f"executor={row['executor']}", f"adapter.method={row['adapter']}"]
    if row["executor"] == "streamed":
        # Neither divides the context of 256.
        words += ["executor.chunk=48", "executor.block=100"]
    for name in BY_NAME:
        if row[name] != OFF:
            options = {"enabled": True, **NEEDS.get(name, {}), **MILD.get(name, {})}
            words += [f"optimizations.{name}.{option}={value}" for option, value in options.items()]
    return words


def test_the_rules_are_the_programs_own() -> None:
    rules = Rules()
    assert rules({"executor": "whole", "gradient_checkpointing": ACTIVE, "fused_loss": ACTIVE})
    assert not rules({"gradient_checkpointing": ACTIVE, "checkpoint_offload": ACTIVE}), "two claims on one site"
    assert rules({"executor": "streamed", "fused_loss": IDLE}) and not rules({"executor": "streamed", "fused_loss": ACTIVE})
    assert not rules({"adapter": "full", "qlora": ACTIVE}) and not rules({"memory_pool": ACTIVE}), "no adapters; no GPU"


@pytest.mark.slow
def test_few_runs_hold_every_pair() -> None:
    assert len(rows()) <= MOST_RUNS


@pytest.mark.slow
@pytest.mark.parametrize("number", range(MOST_RUNS))
def test_a_run_with_these_switches_trains(number: int, trained: Trained) -> None:
    if number >= len(rows()):
        pytest.skip(f"{len(rows())} runs hold every pair")
    row = rows()[number]
    words = overrides(row)
    folder = trained(*TINY, *words)
    losses = [line["loss"] for line in metrics_file.read(folder.metrics) if "loss" in line]
    plan, summary = json.loads(folder.plan.read_text()), json.loads(folder.summary.read_text())
    assert len(losses) == summary["steps"] and (len(losses) == STEPS or "early_stopping" in summary["applied"]), words
    assert all(map(math.isfinite, losses)) and losses[-1] <= losses[0] + CLASS_TOLERANCE, f"{words}: {losses}"
    switches = {switch["name"]: switch for switch in plan["decisions"]}
    assert {name for name, switch in switches.items() if switch["requested"]} == {name for name in BY_NAME if row[name] != OFF}
    assert all(switch["active"] or switch["reason"] for switch in switches.values() if switch["requested"]), words
    # What it acted on comes first in its words: "14 norms …".
    counts = {name: int(text.split()[0].replace(",", "")) for name, text in summary["applied"].items()}
    assert counts.keys() == {name for name, switch in switches.items() if switch["active"]} and min(counts.values(), default=1) > 0, words
