"""The jobs of a multirun side by side, each against its baseline: what a changed setting costs and saves, and whether the loss stays.

A job's baseline is the multirun's first job, or that variant of an ablation which it is held against, with all else equal.
Where only optimizations differ, the weakest class among those that differ says how far the training losses may lie apart.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from elite.ablation import baseline_of, part_of
from elite.callbacks import metrics_file
from elite.jobs import Job, State, read
from elite.optimizations import ALL
from elite.optimizations.contract import TOLERANCES, Exactness
from elite.report.forerunner import CLAIMED
from elite.runfolder import RunFolder

VARIANT = "ablation.variant="
WEAKEST = (Exactness.APPROX, Exactness.EQUAL, Exactness.EXACT)
DRIFT_STEPS = 50
"""Of fewer steps the mean still wavers with single ones: only the largest difference is judged."""
ELSEWHERE = ("optimizations", "output", "logger", "ablation", "name", "resume")
"""Parts of a configuration that change no loss, or are compared by what acts."""


@dataclass(frozen=True)
class Run:
    """What a finished job left."""

    config: dict[str, Any]
    plan: dict[str, Any]
    summary: dict[str, Any]
    losses: dict[int, float]
    """Training loss by step."""

    @property
    def active(self) -> set[str]:
        """Optimizations that acted."""
        return {switch["name"] for switch in self.plan["decisions"] if switch["active"]}


@dataclass(frozen=True)
class Against:
    """A job's losses held against its baseline's."""

    part: str
    """Optimizations that act in one of the two only."""
    exactness: Exactness | None
    """The weakest class among them; None where other settings differ as well, or nothing does."""
    largest: float
    drift: float
    """Mean difference of the training loss, over the steps that both took."""
    steps: int
    limit: float | None
    """Of the largest difference; None where the class promises none."""
    drift_limit: float | None
    holds: bool | None
    """Whether the class's word is kept; None where it gives none."""


@dataclass(frozen=True)
class Row:
    """One job."""

    number: str
    label: str
    """Its overrides that not every job has."""
    state: State
    reason: str
    baseline: str
    """Number of the job that it is held against; its own, if it is one."""
    claimed: str
    """By the forerunner, of the part that this job varies."""
    run: Run | None = field(default=None, repr=False)
    against: Against | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        plain = {name: getattr(self, name) for name in ("number", "label", "reason", "baseline", "claimed")} | {"state": self.state.value}
        against = None
        if self.against:
            against = vars(self.against) | {"exactness": self.against.exactness.value if self.against.exactness else None}
        return plain | {"against": against, "summary": self.run.summary if self.run else None}


def gathered(sweep: Path) -> list[Row]:
    """The jobs of the multirun in this folder, in their order; those that still run or were cut off among them."""
    jobs = read(sweep)
    common = set.intersection(*(set(job.overrides) for job in jobs.values())) if len(jobs) > 1 else set()
    runs = {folder: _run(RunFolder(folder)) if job.state is State.finished else None for folder, job in jobs.items()}
    rows = []
    for folder, job in jobs.items():
        origin = _baseline(folder, job, jobs)
        run, base = runs[folder], runs[origin]
        rows.append(
            Row(
                number=folder.name,
                label=" ".join(override.removeprefix(VARIANT) for override in job.overrides if override not in common) or "as it is",
                state=job.state,
                reason=job.reason.splitlines()[0] if job.reason else "",
                baseline=origin.name,
                claimed=_claimed(job),
                run=run,
                against=_compared(run, base) if run and base and folder != origin else None,
            )
        )
    return rows


def _run(folder: RunFolder) -> Run:
    config: Any = OmegaConf.to_container(OmegaConf.load(folder.config))
    lines = metrics_file.read(folder.metrics)
    losses = {int(line["step"]): line["loss"] for line in lines if "loss" in line}
    return Run(config, json.loads(folder.plan.read_text()), json.loads(folder.summary.read_text()), losses)


def _variant(job: Job) -> str | None:
    given = [override.removeprefix(VARIANT) for override in job.overrides if override.startswith(VARIANT)]
    return given[-1] if given else None


def _baseline(folder: Path, job: Job, jobs: dict[Path, Job]) -> Path:
    variant = _variant(job)
    if variant is None:
        return next(iter(jobs))

    def others(of: Job) -> list[str]:
        return sorted(override for override in of.overrides if not override.startswith(VARIANT))

    wanted = baseline_of(variant)
    return next((path for path, other in jobs.items() if _variant(other) == wanted and others(other) == others(job)), folder)


def _claimed(job: Job) -> str:
    part = part_of(_variant(job))
    return next((CLAIMED.get(kind.row, "") for kind in ALL if kind.name == part), "")


def _compared(run: Run, base: Run) -> Against:
    differing = sorted(run.active ^ base.active)
    exactness = _weakest(differing) if _rest(run.config) == _rest(base.config) else None
    both = sorted(run.losses.keys() & base.losses.keys())
    differences = [run.losses[step] - base.losses[step] for step in both]
    largest, drift = max(map(abs, differences), default=0.0), sum(differences) / max(1, len(differences))
    # In bf16 the same sums in another order round otherwise.
    held_to = Exactness.EQUAL if exactness is Exactness.EXACT and "mixed_precision" in run.active | base.active else exactness
    tolerance = TOLERANCES.get(held_to) if held_to else None
    judged = tolerance is not None and len(both) >= DRIFT_STEPS
    holds = None
    if tolerance is not None:
        holds = largest <= tolerance.largest and (not judged or abs(drift) <= tolerance.drift)
    return Against(
        part=", ".join(differing),
        exactness=exactness,
        largest=largest,
        drift=drift,
        steps=len(both),
        limit=tolerance.largest if tolerance else None,
        drift_limit=tolerance.drift if tolerance and judged else None,
        holds=holds,
    )


def _rest(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ELSEWHERE}


def _weakest(parts: Sequence[str]) -> Exactness | None:
    classes = {kind.exactness for kind in ALL if kind.name in parts}
    return next((exactness for exactness in WEAKEST if exactness in classes), None)
