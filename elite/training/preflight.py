"""Before the first step: one pass on random tokens at the planned shape, its peak and time against the plan's."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from elite.executor.streamed.attach import Attached
from elite.executor.streamed.probe import Estimate, Probe
from elite.training.trial import Subject, Trial, attempt, one_pass

SHORT_S = 5.0
"""A pass shorter than this is run twice: the first one compiles kernels."""


@dataclass(frozen=True)
class Preflight:
    """Planned and measured. Bytes; seconds of a whole optimizer step."""

    planned_bytes: float
    measured_bytes: float
    """Highest; where memory ran out, what there was just before."""
    reserved_bytes: float
    usable_bytes: float
    planned_step_s: float
    step_s: float
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def preflight(subject: Subject, attached: Attached | None, plan: dict[str, Any]) -> Preflight:
    """Measure a pass under the plan's executor.

    One long row under the streamed executor is not carried through whole: a few chunks at both ends are, with everything allocated.

    Args:
        attached: the streamed model, if it is one.
        plan: as in `plan.json`.
    """
    sequences, accumulation = plan["micro_batch"], plan["accumulation"]
    if attached is not None and sequences == 1:
        trial, seconds = _ends(subject, attached)
    else:
        trial = attempt(subject, sequences, one_pass(subject, sequences), accumulation > 1)
        seconds = trial.seconds
        if not trial.out_of_memory and seconds < SHORT_S:
            seconds = attempt(subject, sequences, one_pass(subject, sequences), accumulation > 1).seconds
    return Preflight(
        planned_bytes=plan["total_bytes"],
        measured_bytes=trial.peak_bytes,
        reserved_bytes=trial.reserved_bytes,
        usable_bytes=subject.limit_bytes,
        planned_step_s=plan["step_s"],
        step_s=seconds * accumulation,
        fits=trial.fits(subject.limit_bytes),
    )


def _ends(subject: Subject, attached: Attached) -> tuple[Trial, float]:
    """The trial, and a whole pass's seconds. Gradients appear layer by layer; at the last one nearly all are there."""
    made, dtype = list[Estimate](), subject.compute_dtype

    def run() -> None:
        with torch.autocast(subject.device.type, dtype=dtype, enabled=dtype != torch.float32):
            made.append(Probe(attached.runner, subject.context, subject.vocab, subject.sharing).run())

    trial = attempt(subject, 1, run, gradients=True)
    return trial, made[0].step_s if made else trial.seconds
