"""A small change of the command line that would make a run fit."""

from dataclasses import replace

from elite.config import Executor, RunConfig
from elite.errors import PlanError
from elite.facts import GIB, Device, Facts, ModelShape
from elite.optimizations import ALL
from elite.optimizations.contract import Exactness, Optimization, Stage
from elite.plan.executors import Prediction, choose_executor
from elite.streaming import Place

SHORTEST_CONTEXT = 4096
"""No shorter context is proposed: it is the lowest tier's."""


def smallest_change(config: RunConfig, device: Device, shape: ModelShape) -> str:
    """Overrides with which the run would fit: one sequence a micro-batch, few optimizations, any executor, boundaries on
    disk, a shorter context.

    Best effort: optimizations are added one by one, the largest saving first, and those found needless are dropped.
    Says how much memory it would take if nothing helps.
    """

    def made(changed: RunConfig) -> Prediction:
        return choose_executor(changed, device, shape, 1)

    words = ["training.micro_batch=1"] if config.training.sequences > 1 else []
    changed = replace(config, training=replace(config.training, micro_batch=1))
    added: list[type[Optimization]] = []
    while not made(changed).fits:
        kind = _best(changed, device, shape)
        if kind is None:
            break
        changed = _switched(changed, kind, True)
        added.append(kind)
    free = replace(changed, executor=replace(changed.executor, name=Executor.auto))
    if not made(changed).fits and made(free).fits:
        words.append("executor=auto")
        changed = free
    on_disk = replace(changed, executor=replace(changed.executor, boundaries=Place.disk))
    if not made(changed).fits and made(on_disk).fits:
        # Exact, and as fast as the disk; a shorter context would be another run.
        words.append("executor.boundaries=disk")
        changed = on_disk
    context = config.tier.context
    while not made(changed).fits and context // 2 >= SHORTEST_CONTEXT:
        context //= 2
        changed = replace(changed, tier=replace(changed.tier, context=context))
    if not made(changed).fits:
        least = made(changed).estimate.total
        return f"a smaller model, or {least / (1 - config.plan.headroom_fraction) / GIB:.2f} GiB usable for a context of {context}"
    for kind in reversed(added):
        # The shorter context may have made it needless.
        without = _switched(changed, kind, False)
        if made(without).fits:
            changed = without
            added.remove(kind)
    words += [f"optimizations.{kind.name}.enabled=true" for kind in added]
    if context < config.tier.context:
        words.append(f"tier.context={context}")
        if config.tier.target_length >= context:
            words.append(f"tier.target_length={context // 8}")
    return " ".join(words)


def _switched(config: RunConfig, kind: type[Optimization], on: bool) -> RunConfig:
    return replace(config, optimizations=config.optimizations.switched({kind.name: on}))


def _best(config: RunConfig, device: Device, shape: ModelShape) -> type[Optimization] | None:
    """Of the optimizations that are off and could save here: the most exact that suffices alone, else the one that saves most."""
    options = config.optimizations
    on = [kind for kind in ALL if getattr(options, kind.name).enabled]
    before = choose_executor(config, device, shape, 1)
    facts: Facts = before.facts
    # Under the whole executor, which is planned first whichever is chosen, more parts act.
    under_whole = replace(facts, executor=Executor.whole.value)
    acting = [one for kind in on if _may_act(one := kind(getattr(options, kind.name)), under_whole)]
    taken = {site for kind in on for site in kind.claims} | {site for one in acting for site in one.excludes}
    # What acts around steps saves nothing of a step's peak, and another model is no small change.
    apt = [kind for kind in ALL if kind not in on and kind.stage not in (Stage.loop, Stage.geometry)]
    idle = [kind for kind in apt if not kind.claims & taken and _may_act(kind(getattr(options, kind.name)), facts)]
    made = {kind: found for kind in idle if (found := _with(config, kind, device, shape)) is not None}
    saving = [kind for kind in made if made[kind].estimate.total < before.estimate.total]
    enough = [kind for kind in saving if made[kind].fits]
    if enough:
        return min(enough, key=lambda kind: list(Exactness).index(kind.exactness))
    return min(saving, key=lambda kind: made[kind].estimate.total, default=None)


def _may_act(optimization: Optimization, facts: Facts) -> bool:
    try:
        return optimization.check(facts) is None
    except PlanError:
        # Perhaps under the other executor, which planning with it tries.
        return True


def _with(config: RunConfig, kind: type[Optimization], device: Device, shape: ModelShape) -> Prediction | None:
    """The run with one more optimization; None where it cannot act."""
    try:
        return choose_executor(_switched(config, kind, True), device, shape, 1)
    except PlanError:
        return None
