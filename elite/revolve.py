"""Which boundaries to keep when not all can be: binomial checkpointing of a chain of layers.

Symbols: n layers in a stretch whose first boundary is at hand, s boundaries that may be kept besides it.

cost(n, s) is the least number of layer forwards from that first boundary, the first sweep included, so that each layer's own
backward (which recomputes its layer itself) finds its boundary:

    cost(1, s) = 0
    cost(n, 0) = n(n − 1)/2                                     every boundary is reached from the first one anew
    cost(n, s) = min over 0 < m < n of  m + cost(n − m, s − 1) + cost(m, s)      advance by m, keep, reverse the rest, then the start

Source: Griewank and Walther 2000, "Algorithm 799: revolve".
"""

from functools import cache
from math import isqrt

from elite.streaming import Keep


@cache
def best_split(layers: int, free: int) -> tuple[int, int]:
    """The least cost of reversing `layers` layers with `free` boundaries to keep, and how far to advance before keeping one (0: none)."""
    if layers <= 1:
        return 0, 0
    if free == 0:
        return layers * (layers - 1) // 2, 0
    return min(
        (advance + best_split(layers - advance, free - 1)[0] + best_split(advance, free)[0], advance) for advance in range(1, layers)
    )


def slots_for(keep: Keep, layers: int, slots: int) -> int:
    """Boundaries that may exist at once, the embedding's output included."""
    if keep in (Keep.attention, Keep.layers):
        return layers
    if keep is Keep.sqrt:
        # Segments of √L layers: one boundary for each, and those inside the segment at work.
        root = isqrt(layers - 1) + 1
        return min(layers, 2 * root - 1)
    return max(1, min(layers, slots))


def kept_boundaries(layers: int, slots: int) -> tuple[int, ...]:
    """Layers at whose input a boundary is kept by the first sweep; layer 0 is always among them. Segments lie between them."""
    kept, first, free = [0], 0, slots - 1
    while free > 0:
        advance = best_split(layers - first, free)[1]
        if advance == 0:
            break
        first += advance
        kept.append(first)
        free -= 1
    return tuple(kept)


def layer_forwards(layers: int, slots: int) -> int:
    """Layer forwards in a whole step besides those inside each layer's own backward: the first sweep and all recomputation."""
    # The first sweep goes on from the last boundary it keeps to the loss.
    return best_split(layers, slots - 1)[0] + layers - kept_boundaries(layers, slots)[-1]
