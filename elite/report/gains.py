"""How fast settings learn: steps and seconds until a run has the validation loss that the baseline ends with, from `convergence.json`.

The runs are those of `experiment=convergence`, kept by `python -m elite.report.measurement convergence RUN_FOLDER …`, the baseline's first.
Runs that differ in the seed alone are one setting; each is held against the baseline's run of the same seed. Seconds and tokens a second
are compared only between runs of one commit: others had the GPU otherwise.
"""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from elite.optimizations import ALL
from elite.report.forerunner import CLAIMED
from elite.report.markdown import NONE, grid, missing, origin

ONE_DOCUMENT, FILES = "convergence", "convergence_packing"
HEAD = (
    "setting",
    "seeds",
    "last validation loss",
    "steps to the baseline's",
    "speed in steps",
    "speed in seconds",
    "tokens/s",
    "claimed by the forerunner",
)
ELSEWHERE = frozenset({"seed", "name", "logger", "output", "ablation", "resume"})
"""Parts of a configuration that change nothing of what is learnt, or are what is averaged over."""
BASELINE, SWITCH = "baseline", ".enabled"
ROWS = {"schedule.name=one_cycle": 12, "curriculum.name=context": 44} | {kind.name: kind.row for kind in ALL}
"""Of the feature table, by setting."""


@dataclass(frozen=True)
class Point:
    """A validation."""

    step: float
    seconds: float
    """Of all steps before it."""
    loss: float


@dataclass(frozen=True)
class Curve:
    """What one run came to."""

    points: list[Point]
    tokens_per_s: float
    """Of documents: padding is none."""
    commit: str


def table(name: str, folder: Path) -> str:
    """A line for each setting of one recorded comparison."""
    file = folder / f"{name}.json"
    if not file.exists():
        return missing(file.name)
    runs = json.loads(file.read_text())["runs"]
    found = grouped(runs)
    baseline = found[BASELINE]
    rows = [_line(name, curves, baseline, curves is baseline) for name, curves in found.items()]
    first = runs[0]
    said = (
        f"{first['config']['model']['name']}, {first['plan']['context']:,} tokens of context, {first['plan']['steps']} steps of "
        f"{first['plan']['step_tokens']:,} tokens; mean ± standard deviation over seeds, speeds against the baseline of the same seed. "
    )
    environments = [run["environment"] for run in runs]
    return grid(HEAD, rows) + "\n\n" + said + origin(environments, [run["environment"]["device"]["name"] for run in runs]) + "."


settings = partial(table, ONE_DOCUMENT)
"""The table of `experiment=convergence`, one repository as one document."""
packing = partial(table, FILES)
"""The same of packing, files as documents."""


def grouped(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, Curve]]:
    """Curves by setting and seed; the first run's setting is the baseline.

    What the first run's version had no option for differs only if it is switched on.
    """
    found: dict[str, dict[int, Curve]] = {}
    base = dict(_flat(runs[0]["config"]))
    for run in runs:
        flat = _flat(run["config"])
        differing = {key: value for key, value in flat if (base[key] != value if key in base else value is True and key.endswith(SWITCH))}
        found.setdefault(_named(differing) or BASELINE, {})[run["config"]["seed"]] = Curve(
            curve(run["metrics"]), run["summary"]["tokens_per_s"], run["environment"]["commit"]
        )
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


def _line(name: str, runs: dict[int, Curve], baseline: dict[int, Curve], is_baseline: bool) -> tuple[str, ...]:
    goals = {seed: baseline[seed].points[-1] for seed in runs if seed in baseline}
    met = {seed: reached(runs[seed].points, goal.loss) for seed, goal in goals.items()}
    hits = {seed: point for seed, point in met.items() if point is not None}
    together = {seed for seed in goals if runs[seed].commit == baseline[seed].commit}

    def speed(unit: str, of: Iterable[int]) -> list[float]:
        return [getattr(goals[seed], unit) / getattr(hits[seed], unit) for seed in of if seed in hits and getattr(hits[seed], unit)]

    missed = f" ({len(met) - len(hits)} of {len(met)} never)" if len(hits) < len(met) else ""
    claimed = "; ".join(CLAIMED[row] for part in name.split(", ") if (row := ROWS.get(part.removeprefix("without "))) in CLAIMED)
    return (
        name,
        str(len(runs)),
        _spread([run.points[-1].loss for run in runs.values()], 4),
        NONE if is_baseline else _spread([point.step for point in hits.values()], 1) + missed,
        *(NONE if is_baseline else _spread(speed(unit, of), 2, "×") for unit, of in (("step", goals), ("seconds", together))),
        _spread([runs[seed].tokens_per_s for seed in together], 0),
        claimed or NONE,
    )


def _spread(values: Sequence[float], digits: int, unit: str = "") -> str:
    if not values:
        return NONE
    mean = f"{statistics.mean(values):,.{digits}f}{unit}"
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean


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
