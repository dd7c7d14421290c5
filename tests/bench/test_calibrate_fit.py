"""Constants come back from measurements that were made of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elite.bench.calibrate.fit import fitted, points
from elite.errors import DataError
from elite.facts import GIB
from elite.hardware.calibration import Ahead, Calibration, Context, Slack
from elite.report.measurement import MEASUREMENTS

ASSUMED = "assumption: x"
SLACKS = {"blocks": Slack(0.5, 1.0, ASSUMED), "pages": Slack(0.5, 2.0, ASSUMED), "least": Slack(0.5, 3.0, ASSUMED)}
KNOWN = Calibration(**SLACKS, ahead=Ahead(0.25, 0.125, ASSUMED), context=Context(5.0, ASSUMED))


def run(gib: float, share: float, rounding: float, paged: bool = False, context: float | None = None, **changes: Any) -> dict[str, Any]:
    allocated = gib * GIB
    reserved = allocated * (1 + share) + rounding
    steps = [{"allocated_peak_bytes": value * allocated, "reserved_peak_bytes": value * reserved} for value in (0.5, 1.0, 0.9)]
    measured = {} if context is None else {"device_bytes": reserved + context}
    made = {"active": ["memory_pool"] if paged else [], "executor": "streamed", "steps": steps, "measured": measured}
    return made | {"usable_bytes": 64 * GIB, "outcome": "ran"} | changes


def write(path: Path, *runs: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"runs": runs}))
    return path


def test_exact_constants_are_found(tmp_path: Path) -> None:
    blocks = [run(gib, 0.125, 2**28, context=GIB / 2) for gib in (1, 4, 20)]
    pages = [run(gib, 0.03125, 2**24, True, context=GIB / 2) for gib in (2, 8, 30)]
    made = fitted(KNOWN, [write(tmp_path / "a.json", *blocks), write(tmp_path / "b.json", *pages)])
    for found, share, rounding in ((made.blocks, 0.125, 2**28), (made.pages, 0.03125, 2**24)):
        assert found.share == pytest.approx(share, abs=1e-5) and found.rounding_bytes == pytest.approx(rounding, rel=1e-3)
        assert found.source == "measured: a.json, b.json"
    assert made.context.bytes == pytest.approx(GIB / 2)


def test_what_cannot_be_given_back_is_known_under_caps(tmp_path: Path) -> None:
    """All of a cap is reserved when memory runs out under it, in gaps or in tensors. Nothing else is told by such a configuration."""

    def ended(gib: float, outcome: str = "oom", **found: float) -> dict[str, Any]:
        return run(gib, 3, 0, True, outcome=outcome, cap_bytes=gib * GIB * 1.0625 + 2**25, **found)

    runs = [ended(gib, in_gaps_bytes=gib * GIB * 0.0625 + 2**25) for gib in (1, 4, 20)]
    made = fitted(KNOWN, [write(tmp_path / "a.json", *runs, ended(8), *[ended(8, "ran")] * 4)])
    assert made.least.share == pytest.approx(0.0625, abs=1e-5) and made.least.rounding_bytes == pytest.approx(2**25, rel=1e-3)
    assert replace(made, least=KNOWN.least) == KNOWN


def test_nothing_becomes_negative(tmp_path: Path) -> None:
    falling = [run(gib, share, 0) for gib, share in ((1, 0.02), (4, 0.1), (16, 0.12))]
    assert fitted(KNOWN, [write(tmp_path / "a.json", *falling)]).blocks.rounding_bytes == 0
    shrinking = [run(gib, 0, 2**30 / gib) for gib in (1, 4, 16)]
    assert fitted(KNOWN, [write(tmp_path / "a.json", *shrinking)]).blocks.share >= 0


def test_what_says_nothing_is_left_out(tmp_path: Path) -> None:
    kept = [run(gib, 0.25, 0) for gib in (1, 2, 4)]
    useless = [run(8, 3, 0, outcome="oom"), run(8, 3, 0, usable_bytes=32 * GIB), run(8, 3, 0, steps=[])]
    # What was taken ahead is the plan's word, not the allocator's.
    useless.append(run(8, 3, 0, predicted={"ahead_bytes": 32 * GIB}))
    file = write(tmp_path / "a.json", *kept, *useless)
    assert len(points([file])) == 3
    made = fitted(KNOWN, [file])
    assert made.blocks.share == pytest.approx(0.25)
    # Too few of the others.
    assert (made.pages, made.context) == (KNOWN.pages, KNOWN.context)
    with pytest.raises(DataError, match="fewer than"):
        fitted(KNOWN, [write(tmp_path / "b.json", *kept[:2])])


def test_what_is_taken_ahead_is_what_nearly_all_stay_below(tmp_path: Path) -> None:
    """Of 0, 1, … 100 thousandths 98 in a hundred stay below 98; with each executor by itself."""
    shares = [share / 1000 for share in range(101)]
    runs = [run(4, share * times, 0, True, executor=name) for share in shares for name, times in (("whole", 2), ("streamed", 1))]
    made = fitted(KNOWN, [write(tmp_path / "a.json", *runs)])
    assert (made.ahead.whole, made.ahead.streamed) == pytest.approx((0.196, 0.098), abs=1e-6)
    few = fitted(KNOWN, [write(tmp_path / "b.json", *[run(4, share, 0, True) for share in shares])])
    assert few.ahead == KNOWN.ahead and few.pages != KNOWN.pages


def test_what_was_enough_says_that_less_may_be(tmp_path: Path) -> None:
    """What kept to a share counts as one that stays below it, and below nothing less."""

    def taken(share: float, ahead: float) -> list[dict[str, Any]]:
        taken = {"ahead_bytes": 4 * GIB * (1 + ahead)}
        return [run(4, share, 0, True, executor=name, predicted=taken) for name in ("whole", "streamed")]

    def found(*runs: list[dict[str, Any]]) -> Ahead:
        return fitted(KNOWN, [write(tmp_path / "a.json", *(one for some in runs for one in some))]).ahead

    exact = [run(4, share, 0, True, executor=name) for share in (0.02, 0.04) for name in ("whole", "streamed")]
    assert found(exact, taken(0.3, 0.1)).whole == pytest.approx(0.3)
    # Kept to far more than anybody needs, it says nothing of how little; kept to little, that one more needs no more.
    many = [one for _ in range(60) for one in taken(0.01, 0.01)]
    assert found(exact, taken(0.3, 0.1), taken(0.5, 0.5)).whole == pytest.approx(0.3)
    assert found(exact, taken(0.3, 0.1), many).whole == pytest.approx(0.04)
    # Nothing of the allocator's own, from what was taken ahead.
    assert len(points([write(tmp_path / "b.json", *exact, *many)])) == len(exact)


def test_logits_left_behind_are_no_slack() -> None:
    """Drawn configurations say enough of themselves: 9,984 · 3 tokens and 151,936 words, 2 bytes each."""
    file = MEASUREMENTS / "calibration_second.json"
    found = points([file])
    left = [point.left for point in found]
    assert max(left) == 2 * 3 * 9984 * 151936 and left.count(0.0) > len(left) / 2
    assert all(point.left == 0 for point in found if not point.whole)


def test_probes_tell_too() -> None:
    found = points(sorted(MEASUREMENTS.glob("probe_*.json")))
    assert len(found) >= 9 and all(point.reserved > point.allocated and point.device is None for point in found)
    assert replace(KNOWN, blocks=fitted(KNOWN, sorted(MEASUREMENTS.glob("probe_*.json"))).blocks).blocks.share > 0
