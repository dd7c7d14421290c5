"""What is reserved and what the driver shows, from what is allocated."""

from dataclasses import replace
from pathlib import Path

import pytest

from elite.facts import GIB, Facts
from elite.hardware.calibration import Calibration, Context, Slack, calibration, read, write
from elite.optimizations import decide
from elite.plan import facts_of, make_plan, peaks
from tests.plan.helpers import CORPUS, STANDARD, device, phi2, run_config, switches
from tests.plan.test_table import text

KNOWN = calibration()


@pytest.mark.parametrize(("on", "slack"), [((), KNOWN.blocks), (("memory_pool",), KNOWN.pages)], ids=["blocks", "pages"])
def test_by_hand(on: tuple[str, ...], slack: Slack) -> None:
    config = run_config(on=on)
    decisions = decide(switches(*on), facts_of(config, device("h100"), phi2()))
    found = peaks.peaks(10 * GIB, decisions, device("h100"))
    assert found is not None
    assert found.reserved_bytes == pytest.approx(10 * GIB * (1 + slack.share) + slack.rounding_bytes)
    assert found.device_bytes - found.reserved_bytes == pytest.approx(KNOWN.context.bytes)


def test_no_more_is_reserved_than_the_device_grants() -> None:
    machine = device("rtx3090")
    usable = machine.memory_usable_bytes
    near = peaks.peaks(0.99 * usable, (), machine)
    over = peaks.peaks(2.0 * usable, (), machine)
    assert near is not None and near.reserved_bytes == usable
    assert over is not None and over.reserved_bytes == 2.0 * usable


def test_a_plan_has_three_peaks_in_order() -> None:
    made = make_plan(run_config(), device("rtx3090"), phi2(), CORPUS)
    assert made.reserved_bytes is not None and made.device_bytes is not None
    assert made.total_bytes < made.reserved_bytes < made.device_bytes
    plain = made.to_dict()
    assert [plain[f"{name}_bytes"] for name in ("total", "reserved", "device")] == [
        made.total_bytes,
        made.reserved_bytes,
        made.device_bytes,
    ]
    shown = text(made)
    for name, value in (("predicted", made.total_bytes), ("reserved for it", made.reserved_bytes), ("the driver shows", made.device_bytes)):
        (line,) = [line for line in shown.splitlines() if line.startswith(name)]
        assert f"{value / GIB:.2f} GiB" in line


def test_pages_reserve_less_than_blocks() -> None:
    plain, paged = (make_plan(run_config(on=on), device("rtx3090"), phi2(), CORPUS) for on in (STANDARD, (*STANDARD, "memory_pool")))
    assert plain.total_bytes == paged.total_bytes
    assert plain.reserved_bytes is not None and paged.reserved_bytes is not None and paged.reserved_bytes < plain.reserved_bytes


def test_a_cpu_has_neither() -> None:
    made = make_plan(run_config(), device("cpu"), phi2(), CORPUS)
    assert made.reserved_bytes is None and made.device_bytes is None
    assert "the driver shows" not in text(made)


def test_every_constant_names_its_source() -> None:
    for part in (KNOWN.blocks, KNOWN.pages, KNOWN.context):
        assert part.source.startswith(("measured: ", "assumption: "))


def test_constants_survive_writing(tmp_path: Path) -> None:
    made = Calibration(Slack(0.25, 7.0, "measured: a"), replace(KNOWN.pages, share=0.5), Context(3.0, "assumption: b"))
    write(made, tmp_path / "calibration.json")
    assert read(tmp_path / "calibration.json") == made
    assert calibration() == KNOWN


def test_a_tight_plan_in_blocks_is_warned_of() -> None:
    """One of 40 drawn configurations ended so: 69 of 78 GiB planned, 22 GiB free in blocks that did not fit."""
    machine = device("h100")
    paged = decide(switches("memory_pool"), Facts(phi2(), machine, 4096, 1, 2**20, "lora"))
    tight = 0.89 * machine.memory_usable_bytes
    assert peaks.may_be_held_up(tight, (), machine) and not peaks.may_be_held_up(tight, paged, machine)
    assert not peaks.may_be_held_up(0.5 * tight, (), machine)
    assert not peaks.may_be_held_up(tight, (), replace(machine, kind="cpu"))
