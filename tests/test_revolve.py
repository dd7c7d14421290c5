"""Binomial checkpointing against its closed form."""

from itertools import pairwise
from math import comb, isqrt

import pytest

from elite.revolve import best_split, kept_boundaries, layer_forwards, slots_for
from elite.streaming import Keep


def closed_form(layers: int, slots: int) -> int:
    """Least forwards with `slots` boundaries, the first included: r·l − C(s + r, s + 1) with the least r such that l ≤ C(s + r, s).

    Source: Griewank and Walther 2000, eq. (3).
    """
    repeats = next(r for r in range(layers + 1) if layers <= comb(slots + r, slots))
    return repeats * layers - comb(slots + repeats, slots + 1)


@pytest.mark.parametrize("slots", range(1, 9))
def test_the_cost_is_the_binomial_one(slots: int) -> None:
    assert [best_split(layers, slots - 1)[0] for layers in range(1, 61)] == [closed_form(layers, slots) for layers in range(1, 61)]


@pytest.mark.parametrize("slots", range(1, 9))
def test_kept_boundaries(slots: int) -> None:
    """They rise from the first layer, are no more than the slots, and keeping them costs no more than the least cost."""
    for layers in range(1, 61):
        kept = kept_boundaries(layers, slots)
        assert kept[0] == 0 and len(kept) <= min(slots, layers) and kept[-1] < layers
        assert all(a < b for a, b in pairwise(kept))
        # The first sweep, then each segment reversed with the slots that those above it have left free.
        segments = list(pairwise((*kept, layers)))
        recomputed = sum(best_split(stop - start, slots - 1 - i)[0] for i, (start, stop) in enumerate(segments))
        assert kept[-1] + recomputed == best_split(layers, slots - 1)[0]
        assert layer_forwards(layers, slots) == layers + recomputed


def test_slots() -> None:
    for layers in range(1, 101):
        assert slots_for(Keep.layers, layers, 1) == slots_for(Keep.attention, layers, 1) == layers
        assert slots_for(Keep.sqrt, layers, 1) <= 2 * isqrt(layers) + 1
        assert [slots_for(Keep.multilevel, layers, slots) for slots in (1, layers, layers + 1)] == [1, layers, layers]


def test_no_recomputation_with_a_slot_for_each_layer() -> None:
    assert [layer_forwards(layers, layers) for layers in range(1, 50)] == list(range(1, 50))


def test_figures_from_the_literature() -> None:
    """Four slots and three repeats reach C(7, 3) = 35 layers."""
    assert best_split(35, 3)[0] == 3 * 35 - comb(7, 5)
    assert best_split(36, 3)[0] - best_split(35, 3)[0] == 4
