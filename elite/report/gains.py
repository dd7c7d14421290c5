"""How fast settings learn: steps and seconds until a run has the validation loss that the baseline ends with, from `convergence.json`.

The runs are those of `experiment=convergence`, kept by `python -m elite.report.measurement convergence RUN_FOLDER …`, the baseline's first.
Runs that differ in the seed alone are one setting; each is held against the baseline's run of the same seed.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from elite.optimizations import ALL
from elite.report.forerunner import CLAIMED
from elite.report.markdown import NONE, grid, missing, origin

FILE = "convergence.json"
HEAD = (
    "setting",
    "seeds",
    "last validation loss",
    "steps to the baseline's",
    "speed in steps",
    "speed in seconds",
    "claimed by the forerunner",
)
ELSEWHERE = frozenset({"seed", "name", "logger", "output", "ablation", "resume"})
"""Parts of a configuration that change nothing of what is learnt, or are what is averaged over."""
ROWS = {"schedule.name=one_cycle": 12, "curriculum.name=context": 44} | {kind.name: kind.row for kind in ALL}
"""Of the feature table, by setting."""


@dataclass(frozen=True)
class Point:
    """A validation."""

    step: float
    seconds: float
    """Of all steps before it."""
    loss: float


def table(folder: Path) -> str:
    """A line for each setting."""
    file = folder / FILE
    if not file.exists():
        return missing(FILE)
    runs = json.loads(file.read_text())["runs"]
    settings = grouped(runs)
    (baseline, *_), by_seed = settings, next(iter(settings.values()))
    rows = [_line(name, runs_of, by_seed, name == baseline) for name, runs_of in settings.items()]
    first = runs[0]
    said = (
        f"{first['config']['model']['name']}, {first['plan']['context']:,} tokens of context, {first['plan']['steps']} steps of "
        f"{first['plan']['step_tokens']:,} tokens; mean ± standard deviation over seeds, speeds against the baseline of the same seed. "
    )
    environments = [run["environment"] for run in runs]
    return grid(HEAD, rows) + "\n\n" + said + origin(environments, [run["environment"]["device"]["name"] for run in runs]) + "."


def grouped(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, list[Point]]]:
    """Curves by setting and seed; the first run's setting is the baseline."""
    found: dict[str, dict[int, list[Point]]] = {}
    base = dict(_flat(runs[0]["config"]))
    for run in runs:
        differing = {key: value for key, value in _flat(run["config"]) if base.get(key) != value}
        found.setdefault(_named(differing) or "baseline", {})[run["config"]["seed"]] = curve(run["metrics"])
    return found


def curve(metrics: Sequence[dict[str, float]]) -> list[Point]:
    """The validations of a run."""
    seconds, points = 0.0, []
    for line in metrics:
        seconds += line.get("step_time_s", 0.0)
        if "val_loss" in line:
            points.append(Point(line["step"], seconds, line["val_loss"]))
    return points


def reached(points: Sequence[Point], loss: float) -> Point | None:
    """Where the curve first comes down to this loss, on a straight line between validations; None if it does not."""
    for before, after in pairwise(points):
        if after.loss <= loss < before.loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            step, seconds = ((1 - share) * one + share * two for one, two in ((before.step, after.step), (before.seconds, after.seconds)))
            return Point(step, seconds, loss)
    return None


def _line(name: str, runs: dict[int, list[Point]], baseline: dict[int, list[Point]], is_baseline: bool) -> tuple[str, ...]:
    goals = {seed: points[-1] for seed, points in baseline.items()}
    met = {seed: reached(points, goals[seed].loss) for seed, points in runs.items() if seed in goals}
    hits = {seed: point for seed, point in met.items() if point is not None}
    speeds = [
        [getattr(goals[seed], unit) / getattr(point, unit) for seed, point in hits.items() if getattr(point, unit)]
        for unit in ("step", "seconds")
    ]
    missed = f" ({len(met) - len(hits)} of {len(met)} never)" if len(hits) < len(met) else ""
    claimed = "; ".join(CLAIMED[row] for part in name.split(", ") if (row := ROWS.get(part.removeprefix("without "))) in CLAIMED)
    return (
        name,
        str(len(runs)),
        _spread([points[-1].loss for points in runs.values()], 4),
        NONE if is_baseline else _spread([point.step for point in hits.values()], 1) + missed,
        *(NONE if is_baseline else _spread(values, 2, "×") for values in speeds),
        claimed or NONE,
    )


def _spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    if not values:
        return NONE
    mean = f"{statistics.mean(values):.{digits}f}{unit}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if not prefix and name in ELSEWHERE:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _named(differing: dict[str, Any]) -> str:
    """A setting in words: parts by their names, everything else as overrides; options of a part that differ by themselves are left out."""
    words = []
    for key, value in differing.items():
        group, _, rest = key.partition(".")
        if group == "optimizations":
            name, _, option = rest.partition(".")
            words += [name if value else f"without {name}"] if option == "enabled" else [f"{rest}={value}"] if option else []
        else:
            words.append(f"{key}={value}")
    return ", ".join(words)
