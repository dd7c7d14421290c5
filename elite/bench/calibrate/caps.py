"""Does what the plan says fits run, and what it says does not, not? Configurations under a memory cap a little above or below their plan.

The cap lies 3 to 6 % above or below the least that the plan says has to be reserved, and holds for torch's allocator while the steps run.
Above it the configuration must run, below it must run out of memory. They are drawn in pages (`memory_pool`), and nothing is taken ahead.
"""

import random
from typing import Any

import torch

from elite.bench.calibrate.grid import Request, drawn, keep, left
from elite.bench.calibrate.measure import Machine, configured, ended, ready, stepped
from elite.bench.calibrate.sample import Drawn
from elite.console import console
from elite.plan.words import gib
from elite.report.calibration import OUT_OF_MEMORY, RAN
from elite.training.live_bytes import LiveBytes

CAPPED_STEPS = 3
"""Under a cap."""
MARGINS = (0.03, 0.06)
"""Nearest and farthest share of the prediction between it and the cap."""


def caps(request: Request, peak: str = "needed") -> dict[str, Any]:
    """Run what is left of a draw under its caps; returns what the file gets.

    Args:
        peak: the prediction that caps are set around, `needed` or `allocated`; on a CPU `allocated` always.

    Raises:
        ConfigError: the file holds another draw.
    """
    found, machine = drawn(request), Machine(request.cache)
    placed = margins(request.seed, request.count)
    for one in left(found):
        run = capped(one, placed[int(one.name)], machine, peak, request.cache)
        keep(request.file, found, run, machine.name)
        console.print(_said(run), markup=False)
    right = sum(run["as_planned"] for run in found["runs"])
    console.print(f"{right} of {len(found['runs'])} as planned")
    return found


def margins(seed: int, count: int) -> list[float]:
    """A cap's distance from each prediction, as a share of it; half of them, in any order, below."""
    generator = random.Random(f"margins {seed} {count}")
    signs = [1.0 if i % 2 else -1.0 for i in range(count)]
    generator.shuffle(signs)
    return [sign * generator.uniform(*MARGINS) for sign in signs]


def capped(one: Drawn, margin: float, machine: Machine, peak: str, cache: str | None) -> dict[str, Any]:
    """The row of one configuration under its cap."""
    row: dict[str, Any] = one.to_dict() | {"allocated_before_bytes": machine.cleared(), "margin": margin, "expected": margin > 0}
    with ended(row), ready(configured(one, cache), machine, row) as (made, watch):
        on_cpu = machine.driver is None
        around = row["predicted"]["allocated_bytes" if on_cpu else f"{peak}_bytes"]
        row |= {"cap_around": "allocated" if on_cpu else peak, "cap_bytes": around * (1 + margin), "steps": []}
        if on_cpu:
            assert watch.live is not None
            # What exists already counts too.
            limit = LiveBytes(row["cap_bytes"] - watch.live.current)
            with limit:
                row["steps"] += [stepped(made, watch) for _ in range(CAPPED_STEPS)]
        else:
            torch.cuda.set_per_process_memory_fraction(row["cap_bytes"] / torch.cuda.get_device_properties(machine.device).total_memory)
            for _ in range(CAPPED_STEPS):
                row["steps"].append(stepped(made, watch))
    # Any other failure is neither.
    row["as_planned"] = row["outcome"] == (RAN if row["expected"] else OUT_OF_MEMORY)
    return row


def _said(run: dict[str, Any]) -> str:
    cap = f"cap {gib(run['cap_bytes'])}, {run['margin']:+.1%} of the plan" if "cap_bytes" in run else run["error"]
    verdict = "as planned" if run["as_planned"] else "NOT as planned"
    return f"{run['name']}  {cap}: {'should run' if run['expected'] else 'should not run'}, {run['outcome']}: {verdict}"
