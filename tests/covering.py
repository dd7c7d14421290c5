"""Pairwise covering arrays: few rows in which every allowed pair of values meets.

Greedy, one row at a time, after Cohen et al. 1997 (The AETG system, IEEE Transactions on Software Engineering 23(7)).
"""

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations

Factors = Mapping[str, Sequence[Hashable]]
Row = dict[str, Hashable]
Choice = tuple[str, Hashable]
Pair = frozenset[Choice]
Allowed = Callable[[Row], bool]
"""Whether a partial row may stand; where it refuses one, it refuses every row that contains it."""
CANDIDATES = 20
"""Rows that are tried for one that is taken."""


def pairs(row: Row) -> set[Pair]:
    """Pairs of choices that meet in it."""
    return {frozenset(pair) for pair in combinations(row.items(), 2)}


def allowed_pairs(factors: Factors, allowed: Allowed) -> set[Pair]:
    """Pairs of choices that some row may contain, as far as pairs alone tell."""
    found = set()
    for one, two in combinations(factors, 2):
        for pair in (((one, a), (two, b)) for a in factors[one] for b in factors[two]):
            if allowed(dict(pair)):
                found.add(frozenset(pair))
    return found


def covering_array(factors: Factors, allowed: Allowed, seed: int = 0) -> list[Row]:
    """Rows with a value for every factor that together contain every allowed pair.

    Raises:
        ValueError: a pair is allowed, but found in no row that is.
    """
    draw = random.Random(seed)
    missing, rows = allowed_pairs(factors, allowed), []
    while missing:
        # Sorted, for sets of strings have another order in each process.
        starts = sorted(missing, key=lambda pair: sorted(map(repr, pair)))
        candidates = [row for start in draw.choices(starts, k=CANDIDATES) if (row := _completed(factors, allowed, start, missing, draw))]
        if not candidates:
            raise ValueError(f"no allowed row was found that contains {sorted(map(repr, starts[0]))}")
        best = max(candidates, key=lambda row: len(pairs(row) & missing))
        rows.append(best)
        missing -= pairs(best)
    return rows


def _completed(factors: Factors, allowed: Allowed, start: Pair, missing: set[Pair], draw: random.Random) -> Row | None:
    """A whole row that begins with `start`, each further value the one that meets most of what is missing; None if it gets stuck."""
    row: Row = dict(sorted(start, key=repr))
    others = [name for name in factors if name not in row]
    draw.shuffle(others)
    for name in others:
        values = [value for value in factors[name] if allowed({**row, name: value})]
        if not values:
            return None
        draw.shuffle(values)
        row[name] = max(values, key=lambda value: sum(frozenset({(name, value), choice}) in missing for choice in row.items()))
    return row
