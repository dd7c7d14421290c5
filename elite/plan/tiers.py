"""Which tier a run gets when none is asked for."""

from collections.abc import Iterable

from elite.config import RunConfig
from elite.errors import PlanError
from elite.facts import GIB, Corpus, Device, ModelShape
from elite.plan.batch import SHARED_WORD, with_shared_sequences
from elite.plan.plan import Plan, make_plan
from elite.plan.words import duration


def planned_on_all(config: RunConfig, device: Device, shape: ModelShape, corpus: Corpus) -> tuple[RunConfig, Plan]:
    """The run as asked for, with its plan; if that does not fit and there are several GPUs, the one whose ranks share each sequence, if
    that does.

    Raises:
        PlanError: the run as asked for cannot be planned.
    """
    made = make_plan(config, device, shape, corpus)
    shared = None if made.fits else with_shared_sequences(config, device)
    if shared is not None:
        try:
            other = make_plan(shared, device, shape, corpus)
        except PlanError:
            # This model or executor is none whose sequences ranks can share.
            return config, made
        if other.fits:
            return shared, other
    return config, made


def choose_tier(
    candidates: Iterable[tuple[str, RunConfig]], device: Device, shape: ModelShape, corpus: Corpus
) -> tuple[RunConfig, Plan, str]:
    """The highest tier that fits, on all GPUs together if not on each alone, and makes sense; else the lowest that fits.

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
    for name, asked in candidates:
        config, last = planned_on_all(asked, device, shape, corpus)
        objection = _objection(last, config)
        shared = "" if config is asked else f" It fits as {device.count} ranks share each sequence: {SHARED_WORD}."
        if not objection:
            return config, last, reason + shared
        if last.fits:
            lowest = config, last, f"{reason} No tier satisfies every rule; this is the lowest that fits, though {objection}.{shared}"
        reason = f"{name} is refused: {objection}."
    if lowest is not None:
        return lowest
    if last is None:
        raise PlanError("tier=auto was given no tier to choose from", "tier=tier1")
    parts = ", ".join(f"{part.replace('_', ' ')} {value / GIB:.2f}" for part, value in last.memory.items() if value >= GIB / 100)
    needs = f"{last.total_bytes / GIB:.2f} GiB of {last.usable_bytes / GIB:.2f} usable"
    raise PlanError(f"no tier fits {device.name}: {last.tier} needs {needs}: {last.shortage} ({parts})", last.fix)


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
