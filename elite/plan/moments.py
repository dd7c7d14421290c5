"""Moments of a row of parts, one after another at work."""

from collections.abc import Iterator, Sequence

from elite.optimizations.contract import Estimate
from elite.optimizations.parts import Part


def passing(held: Estimate, parts: Sequence[Part], forward: bool, makes: bool = False) -> Iterator[Estimate]:
    """Moments at which each part in turn is at work, beside what is held.

    Args:
        makes: gradients of weights come into being.
    """
    for index, part in enumerate(parts):
        before = parts[: index + 1]
        saved, scores = sum(p.saved for p in before), sum(p.scores for p in before)
        at_work = part.forward if forward else part.backward
        yield plus(
            held,
            saved_activations=saved - scores - (parts[0].whole_input if held.layer_inputs else 0.0),
            attention_scores=scores,
            gradients=sum(p.gradients for p in parts[index + 1 :]) if makes else 0.0,
            layer_workspace=0.0 if part.wide else at_work,
            mlp_workspace=at_work if part.wide else 0.0,
        )


def plus(one: Estimate, other: Estimate | None = None, **more: float) -> Estimate:
    """Sums by component."""
    sums = one.by_component()
    for name, value in [*(other.by_component() if other else {}).items(), *more.items()]:
        sums[name] += value
    return Estimate(**sums)
