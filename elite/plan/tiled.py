"""A tiled MLP as one part of its layer: each tile is computed again by itself and goes back, the last one first.

While a tile is at work, there are the gradient of the whole output, which tiles read in place, and the gradients of the inputs of the tiles
that went back before, which are put together once all are there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from elite.optimizations.contract import Estimate
from elite.optimizations.parts import FP32, Part, Sizes
from elite.plan.moments import passing


@dataclass(frozen=True)
class Whole:
    """What is as long as the micro-batch. Bytes."""

    read: float
    """The MLP's input."""
    made: float
    """Its output."""
    ends: bool
    """Nobody asks for the gradient of the input."""
    let_go: bool
    """The output's gradient is a tensor of its own, which the last one that reads it lets go."""


def tiled(inner: Sequence[Part], short: Sequence[Part], s: Sizes, tokens: int, whole: Whole, kept: bool) -> Part:
    """The MLP for so many tokens.

    Args:
        inner: parts of the MLP for a tile.
        short: the same for the last tile, which may have fewer tokens.
        s: sizes of a tile.
        kept: whether an earlier part keeps the input.
    """
    tiles, inner, short = -(-tokens // s.tokens), *(_within(parts, whole.ends) for parts in (inner, short))
    last = tokens - (tiles - 1) * s.tokens
    a_tile = 0.0 if whole.ends else whole.read / tokens * s.tokens
    before_last = 0.0 if whole.ends else whole.read - a_tile
    leaves = 0.0 if whole.ends else whole.read
    made_weights = sum(part.gradients for part in inner)
    # Those that autocast has a copy of sum over tiles in the copy's dtype.
    summed = sum(part.gradients * (s.value / FP32 if part.weights else 1) for part in inner)
    moments = [
        whole.made + before_last + summed + _reading(inner, s),
        (0.0 if whole.let_go else whole.made) + before_last + summed + _highest(inner if inner[-1].lets_go else inner[:-1], forward=False),
        (0.0 if whole.let_go else whole.made) + 2 * leaves,
        whole.made + _either(short),
    ]
    if tiles > 2:
        moments.append(whole.made + before_last - a_tile + summed + _either(inner))
    # The first forward of a tile leaves nothing. Outputs of all are there when they are put together.
    ahead, output = max(_highest([part], forward=True) for part in inner), whole.made / tokens
    forward = whole.made + max(ahead, whole.made)
    # A recomputation is over once the last tile's input is there.
    again = ahead + output * (tokens - s.tokens - last)
    return Part(
        "tiled MLP",
        saved=0.0 if kept else whole.read,
        forward=forward,
        spared=max(0.0, forward - again),
        arrives=whole.made,
        leaves=leaves,
        work=max(moments) - whole.made - leaves,
        gradients=made_weights,
        wide=True,
    )


def _within(parts: Sequence[Part], ends: bool) -> list[Part]:
    """A tile's output gradient is a view of the whole one's. Where nobody asks for the input's, the first maps scale theirs and no more."""
    first, *others = [*parts[:-1], replace(parts[-1], arrives=0.0)]
    return [replace(first, leaves=0.0, work=min(first.leaves + first.work, first.arrives)) if ends else first, *others]


def _reading(parts: Sequence[Part], s: Sizes) -> float:
    """What a tile holds while the whole output's gradient is read: its forward, then its last map, at first or at its highest."""
    *others, last = parts
    at_first = replace(last, leaves=0.0, work=s.value * s.d * s.tokens, waits=0.0) if last.lets_go else last
    *_, moment = passing(Estimate(), [*others, at_first], forward=False)
    return max(_highest(parts, forward=True), moment.total)


def _either(parts: Sequence[Part]) -> float:
    return max(_highest(parts, forward=True), _highest(parts, forward=False))


def _highest(parts: Sequence[Part], forward: bool) -> float:
    """Bytes at the highest moment of a row of parts."""
    return max(moment.total for moment in passing(Estimate(), parts, forward))
