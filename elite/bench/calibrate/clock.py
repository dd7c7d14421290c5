"""How long a step takes, and whether others slowed the host meanwhile.

Rented machines share their cores, which lose and regain their speed within seconds or minutes, and steps that wait for the host with
them. The stress test's operations, timed beside the steps, tell.
"""

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from elite import geometry, hardware
from elite.bench.assemble import Assembled
from elite.facts import Device
from elite.hardware import profiles
from elite.optimizations import decide
from elite.plan import facts_of, streamed
from elite.plan.rates import rates_of
from elite.plan.time import recomputed, step_time
from elite.streaming import Streaming
from elite.training.ahead import alloc_retries

if TYPE_CHECKING:
    from elite.bench.calibrate.measure import Machine

ALIKE, SPREAD = 3, 0.05
"""Steps are timed, nobody watching, until the fastest so many differ by no more than this share …"""
LONGEST_S = 6.0
"""… and the host is no slower than planned, as far as that matters; or until they have taken this long in all."""
TRIES = 5
"""Steps of the tiny model by which the stress test times the host's operations, before and after each of them."""


def timed(made: Assembled, machine: "Machine") -> list[dict[str, float]]:
    """Steps one after another, each on a core that was calm when it began, and beside each what an operation took the host just then:
    cores that others share lose and regain their speed within seconds, and steps that wait for the host with them."""
    began, found, retried = time.perf_counter(), list[dict[str, float]](), alloc_retries(made.ranks.device)
    before = machine.operations.seconds(TRIES)
    while not found or ((not are_alike(found) or disturbed(made, found)) and time.perf_counter() - began < LONGEST_S):
        with machine.cores.chosen():
            if machine.driver is not None:
                # A CPU computes on all of its cores.
                machine.cores.settle()
            seconds = made.step()["step_s"]
        after = machine.operations.seconds(TRIES)
        found.append({"step_s": seconds, "operation_s": (before + after) / 2, "alloc_retries": alloc_retries(made.ranks.device) - retried})
        before, retried = after, alloc_retries(made.ranks.device)
    return found


def disturbed(made: Assembled, steps: list[dict[str, float]]) -> bool:
    """Whether somebody slowed the host, as far as it matters to this step. Its own speed is a guess where nothing was measured."""
    if _device(made).measured is None:
        return False
    return step_here_s(made, min(step["operation_s"] for step in counted(steps))) > (1 + SPREAD) * made.plan.step_s


def clock(row: dict[str, Any], made: Assembled, steps: list[dict[str, float]]) -> None:
    """The row says how long its step takes, as it was timed, and on what host."""
    row["timed"], row["disturbed"] = steps, disturbed(made, steps)
    row["measured"] |= {"step_s": median(step["step_s"] for step in counted(steps)), "operation_s": host_s(steps)}
    row["predicted"]["step_here_s"] = step_here_s(made, row["measured"]["operation_s"])


def host_s(steps: list[dict[str, float]]) -> float:
    """What an operation of the stress test took beside those that count."""
    return median(step["operation_s"] for step in counted(steps))


def are_alike(steps: list[dict[str, float]]) -> bool:
    """Whether the fastest ones took the same time."""
    fastest = [step["step_s"] for step in counted(steps)]
    return len(fastest) == ALIKE and fastest[-1] <= (1 + SPREAD) * fastest[0]


def counted(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """Those whose median is a step's time, the fastest: whoever shares the machine only adds to it."""
    return sorted(steps, key=lambda step: step["step_s"])[:ALIKE]


def step_here_s(made: Assembled, operation_s: float) -> float:
    """The plan's step on a host that takes so long for an operation of the stress test; all other rates as they were for the plan."""
    config, shape, device = made.config, geometry.shape(made.config.model), _device(made)
    rates = replace(rates_of(device), operation_s=profiles.in_runs(operation_s, on_gpu=device.kind == "cuda"))
    facts = facts_of(config, replace(device, measured=rates), shape, made.plan.executor)
    decisions, layout = decide(config.optimizations, facts), Streaming.from_dict(made.plan.layout) if made.plan.layout else None
    again = recomputed(decisions) if layout is None else streamed.recomputed(facts, layout)
    return step_time(facts, decisions, again, made.plan.accumulation, layout).total


def _device(made: Assembled) -> Device:
    """As its plan knew it."""
    return hardware.device(made.config.hardware, cache=Path(made.config.output.cache).expanduser())
