"""Constants of `elite/hardware/calibration.json` from measurements: what is reserved beyond what is allocated, and what the driver counts.

Any file with runs, or one run, whose `steps` have `allocated_peak_bytes` and `reserved_peak_bytes` will do: a calibration grid, a probe,
a comparison. A configuration counts with the highest allocated and the highest reserved peak of its steps.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from elite.errors import DataError
from elite.hardware.calibration import Calibration, Context, Slack
from elite.optimizations.memory_pool import MemoryPool

LEAST = 3
"""From fewer configurations nothing is fitted."""
AT_THE_LIMIT = 0.99
"""Of the usable memory: whoever has reserved as much had to give cached memory back, so it says nothing about slack."""


@dataclass(frozen=True)
class Point:
    """One configuration's peaks, in bytes."""

    paged: bool
    """With `memory_pool`."""
    allocated: float
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
    beyond = [point.device - point.reserved for point in found if point.device is not None]
    if len(beyond) >= LEAST:
        made = replace(made, context=Context(median(beyond), source))
    if made == known:
        raise DataError(f"{len(found)} configurations measured on a GPU: fewer than {LEAST} of a kind", "measure more before fitting")
    return made


def slack(found: Sequence[Point], source: str) -> Slack:
    """Share and rounding with the least sum of squared relative errors, neither of them negative."""
    allocated, reserved = (np.array([getattr(point, name) for point in found]) for name in ("allocated", "reserved"))

    def solved(*columns: Any) -> tuple[list[float], float]:
        matrix = np.stack([column / reserved for column in columns], axis=1)
        values, *_ = np.linalg.lstsq(matrix, np.ones(len(found)), rcond=None)
        return [float(value) for value in values], float(((matrix @ values - 1) ** 2).sum())

    (scale, rounding), _ = solved(allocated, np.ones(len(found)))
    if rounding < 0:
        (scale,), _ = solved(allocated)
        rounding = 0.0
    if scale < 1:
        scale, rounding = 1.0, max(0.0, float(median(reserved - allocated)))
    return Slack(round(scale - 1, 5), float(round(rounding)), source)


def points(files: Sequence[Path]) -> list[Point]:
    """Configurations of these files that ran on a GPU, well below the device's limit."""
    return [point for file in files for point in _points(json.loads(file.read_text()))]


def _points(content: dict[str, Any]) -> Iterator[Point]:
    for run in content.get("runs", [content]):
        steps = [step for step in run.get("steps", []) if "reserved_peak_bytes" in step]
        if "probe" in run:
            steps.append(run["probe"])
        if not steps or run.get("outcome", "ran") != "ran":
            continue
        allocated, reserved = (max(step[f"{kind}_peak_bytes"] for step in steps) for kind in ("allocated", "reserved"))
        if reserved < AT_THE_LIMIT * run.get("usable_bytes", float("inf")):
            yield Point(MemoryPool.name in run["active"], allocated, reserved, run.get("measured", {}).get("device_bytes"))
