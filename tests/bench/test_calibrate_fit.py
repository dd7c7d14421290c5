"""Constants come back from measurements that were made of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elite.bench.calibrate.fit import fitted, points
from elite.errors import DataError
from elite.facts import GIB
from elite.hardware.calibration import Calibration, Context, Slack
from elite.report.measurement import MEASUREMENTS

KNOWN = Calibration(Slack(0.5, 1.0, "assumption: x"), Slack(0.5, 2.0, "assumption: x"), Context(5.0, "assumption: x"))


def run(gib: float, share: float, rounding: float, paged: bool = False, context: float | None = None, **changes: Any) -> dict[str, Any]:
    allocated = gib * GIB
    reserved = allocated * (1 + share) + rounding
    steps = [{"allocated_peak_bytes": value * allocated, "reserved_peak_bytes": value * reserved} for value in (0.5, 1.0, 0.9)]
    measured = {} if context is None else {"device_bytes": reserved + context}
    made = {"active": ["memory_pool"] if paged else [], "steps": steps, "measured": measured, "usable_bytes": 64 * GIB, "outcome": "ran"}
    return made | changes


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


def test_nothing_becomes_negative(tmp_path: Path) -> None:
    falling = [run(gib, share, 0) for gib, share in ((1, 0.02), (4, 0.1), (16, 0.12))]
    assert fitted(KNOWN, [write(tmp_path / "a.json", *falling)]).blocks.rounding_bytes == 0
    shrinking = [run(gib, 0, 2**30 / gib) for gib in (1, 4, 16)]
    assert fitted(KNOWN, [write(tmp_path / "a.json", *shrinking)]).blocks.share >= 0


def test_what_says_nothing_is_left_out(tmp_path: Path) -> None:
    kept = [run(gib, 0.25, 0) for gib in (1, 2, 4)]
    useless = [run(8, 3, 0, outcome="oom"), run(8, 3, 0, usable_bytes=32 * GIB), run(8, 3, 0, steps=[])]
    file = write(tmp_path / "a.json", *kept, *useless)
    assert len(points([file])) == 3
    made = fitted(KNOWN, [file])
    assert made.blocks.share == pytest.approx(0.25)
    # Too few of the others.
    assert (made.pages, made.context) == (KNOWN.pages, KNOWN.context)
    with pytest.raises(DataError, match="fewer than"):
        fitted(KNOWN, [write(tmp_path / "b.json", *kept[:2])])


def test_probes_tell_too() -> None:
    found = points(sorted(MEASUREMENTS.glob("probe_*.json")))
    assert len(found) >= 9 and all(point.reserved > point.allocated and point.device is None for point in found)
    assert replace(KNOWN, blocks=fitted(KNOWN, sorted(MEASUREMENTS.glob("probe_*.json"))).blocks).blocks.share > 0
