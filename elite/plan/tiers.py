"""Which tier a run gets when none is asked for."""

from collections.abc import Iterable

from elite.config import RunConfig
from elite.errors import PlanError
from elite.facts import GIB, Corpus, Device, ModelShape
from elite.plan.plan import Plan, make_plan
from elite.plan.words import duration


def choose_tier(
    candidates: Iterable[tuple[str, RunConfig]], device: Device, shape: ModelShape, corpus: Corpus
) -> tuple[RunConfig, Plan, str]:
    """The highest tier that fits and makes sense; else the lowest that fits.

    Args:
        candidates: tiers from highest to lowest, with the run as composed with each; composed only as far as they are looked at.

    Returns:
        The run, its plan, and the reason: why the next-higher tier was refused, and which rule the chosen one breaks, if any.

    Raises:
        PlanError: no tier fits.
    """
    reason = "It is the highest tier."
    lowest: tuple[RunConfig, Plan, str] | None = None
    last: Plan | None = None
    for name, config in candidates:
        last = make_plan(config, device, shape, corpus)
        objection = _objection(last, config)
        if not objection:
            return config, last, reason
        if last.fits:
            lowest = config, last, f"{reason} No tier satisfies every rule; this is the lowest that fits, though {objection}."
        reason = f"{name} is refused: {objection}."
    if lowest is not None:
        return lowest
    if last is None:
        raise PlanError("tier=auto was given no tier to choose from", "tier=tier1")
    parts = ", ".join(f"{part.replace('_', ' ')} {value / GIB:.2f}" for part, value in last.memory.items() if value >= GIB / 100)
    raise PlanError(
        f"no tier fits {device.name}: {last.tier} needs {last.total_bytes / GIB:.2f} GiB of {last.usable_bytes / GIB:.2f} usable ({parts})",
        last.fix,
    )


def _objection(plan: Plan, config: RunConfig) -> str:
    """The first rule that the plan breaks, as a clause; empty if it breaks none."""
    if not plan.fits:
        within = (plan.usable_bytes - plan.headroom_bytes) / GIB
        if plan.total_bytes / GIB <= within:
            return f"it needs {plan.shortage}"
        return f"it needs {plan.total_bytes / GIB:.2f} GiB, more than the {within:.2f} GiB that leave headroom"
    limit = config.plan.max_step_minutes
    if plan.step_s > limit * 60:
        return f"a step takes {duration(plan.step_s)}, longer than plan.max_step_minutes={limit:g}"
    sequences = plan.corpus.train_tokens / plan.context
    if sequences < config.plan.min_sequences:
        return f"the corpus gives {sequences:.1f} sequences, fewer than plan.min_sequences={config.plan.min_sequences}"
    return ""
