"""Constants of `elite/hardware/calibration.json` from measurements: what is reserved beyond what is allocated, and what the driver counts.

Any file with runs, or one run, whose `steps` have `allocated_peak_bytes` and `reserved_peak_bytes` will do: a calibration grid, a probe,
a comparison. A configuration counts with the highest allocated and the highest reserved peak of its steps. Where memory was taken ahead,
what is reserved says nothing of the allocator.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from elite import geometry
from elite.bench.calibrate.sample import stand_in
from elite.compose import from_overrides
from elite.config import Executor
from elite.errors import DataError
from elite.hardware.calibration import Ahead, Calibration, Context, Slack
from elite.optimizations import decide
from elite.optimizations.memory_pool import MemoryPool
from elite.plan import facts_of
from elite.plan.peaks import left_behind

LEAST = 3
"""From fewer configurations nothing is fitted."""
AT_THE_LIMIT = 0.99
"""Of the usable memory: whoever has reserved as much had to give cached memory back, so it says nothing about slack."""


MOST = 0.95
"""Of the configurations in pages stay below what is taken ahead."""


@dataclass(frozen=True)
class Point:
    """One configuration's peaks, in bytes."""

    paged: bool
    """With `memory_pool`."""
    whole: bool
    """Under the whole executor."""
    allocated: float
    left: float
    """Logits left behind (elite/plan/peaks.py)."""
    reserved: float
    device: float | None
    """In use by the driver's account, where it was measured."""


def fitted(known: Calibration, files: Sequence[Path]) -> Calibration:
    """`known` with every constant that these files can tell, and their names as its source.

    Raises:
        DataError: they tell none.
    """
    found = points(files)
    source = "measured: " + ", ".join(sorted({file.name for file in files}))
    made = known
    blocks, pages = ([point for point in found if point.paged is paged] for paged in (False, True))
    if len(blocks) >= LEAST:
        made = replace(made, blocks=slack(blocks, source))
    if len(pages) >= LEAST:
        made = replace(made, pages=slack(pages, source))
    by_executor = [[point for point in pages if point.whole is whole] for whole in (True, False)]
    if min(map(len, by_executor)) >= LEAST:
        made = replace(made, ahead=Ahead(_most(by_executor[0]), _most(by_executor[1]), source))
    beyond = [point.device - point.reserved for point in found if point.device is not None]
    if len(beyond) >= LEAST:
        made = replace(made, context=Context(median(beyond), source))
    if made == known:
        raise DataError(f"{len(found)} configurations measured on a GPU: fewer than {LEAST} of a kind", "measure more before fitting")
    return made


def _most(found: Sequence[Point]) -> float:
    """What is reserved beyond what is allocated and left behind, as a share that `MOST` of them stay below."""
    shares = [(point.reserved - point.allocated - point.left) / point.allocated for point in found]
    return round(float(np.quantile(shares, MOST)), 4)


def slack(found: Sequence[Point], source: str) -> Slack:
    """Share and rounding with the least sum of squared relative errors, neither of them negative."""
    allocated, left, reserved = (np.array([getattr(point, name) for point in found]) for name in ("allocated", "left", "reserved"))

    def solved(*columns: Any) -> list[float]:
        matrix = np.stack([column / reserved for column in columns], axis=1)
        values, *_ = np.linalg.lstsq(matrix, 1 - left / reserved, rcond=None)
        return [float(value) for value in values]

    scale, rounding = solved(allocated, np.ones(len(found)))
    if rounding < 0:
        (scale,) = solved(allocated)
        rounding = 0.0
    if scale < 1:
        scale, rounding = 1.0, max(0.0, float(median(reserved - allocated - left)))
    return Slack(round(scale - 1, 5), float(round(rounding)), source)


def points(files: Sequence[Path]) -> list[Point]:
    """Configurations of these files that ran on a GPU, well below the device's limit."""
    return [point for file in files for point in _points(json.loads(file.read_text()))]


def _points(content: dict[str, Any]) -> Iterator[Point]:
    for run in content.get("runs", [content]):
        steps = [step for step in run.get("steps", []) if "reserved_peak_bytes" in step]
        if "probe" in run:
            steps.append(run["probe"])
        if not steps or run.get("outcome", "ran") != "ran" or run.get("predicted", {}).get("ahead_bytes"):
            continue
        allocated, reserved = (max(step[f"{kind}_peak_bytes"] for step in steps) for kind in ("allocated", "reserved"))
        if reserved < AT_THE_LIMIT * run.get("usable_bytes", float("inf")):
            whole, paged = run["executor"] == Executor.whole.value, MemoryPool.name in run["active"]
            device = run.get("measured", {}).get("device_bytes")
            yield Point(paged, whole, allocated, _left(run, content) if whole else 0.0, reserved, device)


def _left(run: dict[str, Any], content: dict[str, Any]) -> float:
    """What a drawn configuration leaves behind; what others leave is not known, and counts as slack."""
    if "draw" not in content:
        return 0.0
    config = from_overrides(*run["overrides"]).config
    facts = facts_of(config, stand_in(config, content["draw"]["card"]), geometry.shape(config.model), Executor.whole.value)
    return left_behind(facts, decide(config.optimizations, facts), Executor.whole)
