"""The covering array against counting by hand."""

from itertools import combinations, product

import pytest

from tests.covering import Row, covering_array

FACTORS = {"a": (False, True), "b": (False, True), "c": (False, True), "d": ("x", "y", "z"), "e": (False, True), "f": (False, True)}


def clash(row: Row) -> bool:
    """Not a with b, not c with z, and never a, e and f together."""
    return not (row.get("a") and row.get("b")) and not (row.get("c") and row.get("d") == "z") and not all(row.get(name) for name in "aef")


@pytest.mark.parametrize("seed", range(5))
def test_every_allowed_pair_meets_and_no_other(seed: int) -> None:
    rows = covering_array(FACTORS, clash, seed)
    met = {(one, row[one], two, row[two]) for row in rows for one, two in combinations(FACTORS, 2)}
    everything = {
        (one, first, two, second) for one, two in combinations(FACTORS, 2) for first, second in product(FACTORS[one], FACTORS[two])
    }
    assert everything - met == {("a", True, "b", True), ("c", True, "d", "z")}
    assert all(clash(row) and set(row) == set(FACTORS) for row in rows)
    assert len(rows) <= 12


def test_thirty_switches_take_few_rows() -> None:
    switches = {f"s{n}": (False, True) for n in range(30)}
    rows = covering_array(switches, lambda row: True)
    assert rows == covering_array(switches, lambda row: True) != covering_array(switches, lambda row: True, seed=1)
    # All 2^30 rows, or 4 for each of 435 pairs; the best known array has 8.
    assert len(rows) <= 14


def test_a_pair_that_no_row_can_hold_is_named() -> None:
    """a and b go together, but with neither value of c."""
    switches = dict.fromkeys("abc", (False, True))
    with pytest.raises(ValueError, match=r"\('a', True\)"):
        covering_array(switches, lambda row: not (row.get("a") and row.get("b") and "c" in row))
