"""A small change of the command line that would make a run fit."""

from dataclasses import replace

from elite.config import RunConfig
from elite.facts import GIB, Facts
from elite.optimizations import ALL, OptimizationsConfig, decide
from elite.optimizations.contract import Exactness, Optimization
from elite.plan.memory import predict

SHORTEST_CONTEXT = 4096
"""No shorter context is proposed: it is the lowest tier's."""


def smallest_change(config: RunConfig, facts: Facts) -> str:
    """Overrides with which the run would fit: one sequence a micro-batch, then as few optimizations as it takes, then a shorter context.

    Best effort: optimizations are added one by one, the largest saving first, and those found needless are dropped.
    Says how much memory it would take if nothing helps.
    """
    limit = facts.device.memory_usable_bytes * (1 - config.plan.headroom_fraction)
    words = ["training.micro_batch=1"] if facts.micro_batch > 1 else []
    facts, options = replace(facts, micro_batch=1), config.optimizations
    added: list[type[Optimization]] = []
    while _needed(options, facts) > limit:
        kind = _best(options, facts, limit)
        if kind is None:
            break
        options = _switched(options, kind, True)
        added.append(kind)
    shorter = facts
    while _needed(options, shorter) > limit and shorter.context // 2 >= SHORTEST_CONTEXT:
        shorter = replace(shorter, context=shorter.context // 2)
    least = _needed(options, shorter)
    if least > limit:
        return f"a smaller model, or {least / (1 - config.plan.headroom_fraction) / GIB:.2f} GiB usable for a context of {shorter.context}"
    for kind in reversed(added):
        # The shorter context may have made it needless.
        without = _switched(options, kind, False)
        if _needed(without, shorter) <= limit:
            options = without
            added.remove(kind)
    words += [f"optimizations.{kind.name}.enabled=true" for kind in added]
    if shorter.context < facts.context:
        words.append(f"tier.context={shorter.context}")
        if config.tier.target_length >= shorter.context:
            words.append(f"tier.target_length={shorter.context // 8}")
    return " ".join(words)


def _needed(options: OptimizationsConfig, facts: Facts) -> float:
    return predict(facts, decide(options, facts)).total


def _switched(options: OptimizationsConfig, kind: type[Optimization], on: bool) -> OptimizationsConfig:
    return replace(options, **{kind.name: replace(getattr(options, kind.name), enabled=on)})


def _best(options: OptimizationsConfig, facts: Facts, limit: float) -> type[Optimization] | None:
    """Of the optimizations that are off and could save here: the most exact that suffices alone, else the one that saves most."""
    on = [kind for kind in ALL if getattr(options, kind.name).enabled]
    claimed = {site for kind in on for site in kind.claims}
    before = _needed(options, facts)
    idle = [kind for kind in ALL if kind not in on and not kind.claims & claimed and kind(getattr(options, kind.name)).check(facts) is None]
    needed = {kind: _needed(_switched(options, kind, True), facts) for kind in idle}
    saving = [kind for kind in idle if needed[kind] < before]
    enough = [kind for kind in saving if needed[kind] <= limit]
    if enough:
        return min(enough, key=lambda kind: list(Exactness).index(kind.exactness))
    return min(saving, key=lambda kind: needed[kind], default=None)
