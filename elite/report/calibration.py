"""How far plans were off: tables of `calibration.json` and `calibration_caps.json` (elite.bench.calibrate).

An error is what was planned over what was measured, less one. A configuration that ran out of memory, or failed, is a miss and counts as
such; it has no error.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from elite.facts import GIB
from elite.report.markdown import NONE, gibibytes, grid, missing, origin

CALIBRATION = "calibration"
CAPS = "calibration_caps"
RAN, OUT_OF_MEMORY = "ran", "oom"
QUANTITIES = {
    "allocated": ("allocated_bytes", "allocated_bytes"),
    "reserved": ("reserved_bytes", "reserved_bytes"),
    "device": ("device_bytes", "device_bytes"),
    "host, pinned": ("host_pinned_bytes", "host_pinned_bytes"),
    "host, resident": ("host_pinned_bytes", "host_rss_bytes"),
    "step time": ("step_s", "step_s"),
    "step time, host as it was": ("step_here_s", "step_s"),
}
"""Each with its names among what is predicted and what is measured."""
FROM_BYTES = {"host, pinned": GIB / 4, "host, resident": GIB}
"""Below so much, planned and measured, there is nothing to compare: libraries' own comings and goings."""


@dataclass(frozen=True)
class Row:
    """One configuration."""

    name: str
    outcome: str
    device: str
    model: str
    layers: int
    trained: str
    context: int
    batch: int
    executor: str
    active: tuple[str, ...]
    predicted: dict[str, Any]
    measured: dict[str, Any]

    @classmethod
    def of(cls, run: dict[str, Any]) -> "Row":
        """As a file has it; what failed before it was planned says little of itself."""
        given = dict(word.split("=", 1) for word in run["overrides"])
        active = tuple(run.get("active", ()))
        return cls(
            name=run["name"],
            outcome=run["outcome"],
            device=str(run.get("device", given["hardware"])),
            model=given["model"],
            layers=int(given["model.num_hidden_layers"]),
            trained=("QLoRA" if "qlora" in active else "LoRA") if given["adapter.method"] == "lora" else "all weights",
            context=int(given["tier.context"]),
            batch=int(given["training.micro_batch"]),
            executor=given["executor"],
            active=active,
            predicted=run.get("predicted", {}),
            measured=run.get("measured", {}),
        )


def rows(content: dict[str, Any]) -> list[Row]:
    """Every configuration of a file."""
    return [Row.of(run) for run in content["runs"]]


def errors(row: Row) -> dict[str, float]:
    """By quantity, of those that were both planned and measured."""
    found = {}
    for name, (planned, taken) in QUANTITIES.items():
        expected, real = row.predicted.get(planned), row.measured.get(taken)
        if expected is None or real is None or max(expected, real) < FROM_BYTES.get(name, 0.0) or real <= 0:
            continue
        found[name] = expected / real - 1
    return found


def spread(found: Sequence[Row]) -> dict[str, tuple[int, float, float, float]]:
    """By quantity: how many, and of their absolute errors the median, the 90th percentile and the largest."""
    made = {}
    for name in QUANTITIES:
        sizes = sorted(abs(one[name]) for row in found if name in (one := errors(row)))
        if sizes:
            ninetieth = quantiles(sizes, n=10, method="inclusive")[-1] if len(sizes) > 1 else sizes[0]
            made[name] = len(sizes), median(sizes), ninetieth, sizes[-1]
    return made


def outcomes(found: Sequence[Row]) -> str:
    """How many ended how, in words."""
    lost = sum(row.outcome == OUT_OF_MEMORY for row in found)
    failed = sum(row.outcome not in (RAN, OUT_OF_MEMORY) for row in found)
    return f"{len(found)} configurations: {len(found) - lost - failed} ran, {lost} ran out of memory, {failed} failed"


def summary_lines(content: dict[str, Any]) -> list[str]:
    """For a terminal."""
    found = rows(content)
    lines = [
        f"{name:15} of {n:3}: {middle:7.2%} median, {high:7.2%} at 90 %, {most:7.2%} largest error"
        for name, n, middle, high, most in _spread(found)
    ]
    return [outcomes(found), *lines]


def _spread(found: Sequence[Row]) -> list[tuple[str, int, float, float, float]]:
    return [(name, *values) for name, values in spread(found).items()]


def measured(folder: Path) -> dict[str, Any] | None:
    """The measurement, if there is one."""
    path = folder / f"{CALIBRATION}.json"
    return json.loads(path.read_text()) if path.exists() else None


def summary(folder: Path) -> str:
    """Errors by quantity, how many ran out of memory, and what caps showed."""
    content = measured(folder)
    if content is None:
        return missing(f"{CALIBRATION}.json")
    found = rows(content)
    lines = [(name, str(n), f"{middle:.1%}", f"{high:.1%}", f"{most:.1%}") for name, n, middle, high, most in _spread(found)]
    table = grid(("planned against measured", "configurations", "median error", "90 % are within", "largest"), lines)
    return f"{table}\n\n{outcomes(found)}.{_capped(folder)} {_origin(content)}."


def every(folder: Path) -> str:
    """One line a configuration."""
    content = measured(folder)
    if content is None:
        return missing(f"{CALIBRATION}.json")
    head = ("no.", "device", "model", "layers", "trained", "context", "batch", "executor", "switches")
    lines = [_line(row) for row in rows(content)]
    return (
        grid((*head, *(f"{name} {unit}" for name, unit in _UNITS.items()), "ended"), lines) + f"\n\nPlanned / measured. {_origin(content)}."
    )


_UNITS = {name: "s" if name.startswith("step time") else "GiB" for name in QUANTITIES}


def _line(row: Row) -> tuple[str, ...]:
    facts = (str(row.layers), row.trained, f"{row.context:,}", str(row.batch), row.executor, ", ".join(row.active))
    return (row.name, row.device, row.model, *facts, *(_pair(row, name) for name in QUANTITIES), row.outcome)


def _pair(row: Row, name: str) -> str:
    values = [side.get(key) for side, key in zip((row.predicted, row.measured), QUANTITIES[name])]
    if _UNITS[name] == "s":
        return " / ".join(NONE if value is None else f"{value:.2f}" for value in values)
    return " / ".join(gibibytes(value) for value in values)


def _capped(folder: Path) -> str:
    path = folder / f"{CAPS}.json"
    if not path.exists():
        return ""
    runs = json.loads(path.read_text())["runs"]
    right = sum(run["as_planned"] for run in runs)
    return f" Under caps 3 to 6 % above or below the least that was planned {right} of {len(runs)} ran or ran out of memory as planned."


def _origin(content: dict[str, Any]) -> str:
    return origin([content["environment"]], [content["device"]])
