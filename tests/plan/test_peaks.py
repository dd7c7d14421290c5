"""What is reserved and what the driver shows, from what is allocated."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from elite.config import Executor, PlanConfig
from elite.facts import GIB, Device, Facts
from elite.hardware.calibration import Ahead, Calibration, Context, Slack, calibration, read, write
from elite.optimizations import decide
from elite.plan import make_plan, peaks
from tests.plan.helpers import CORPUS, device, phi2, run_config, switches
from tests.plan.test_table import text

KNOWN = calibration()
AS_NEEDED = PlanConfig(take_ahead=False)
AHEAD = PlanConfig()
POOL = ("memory_pool",)


def found(
    allocated: float,
    machine: Device,
    *on: str,
    asked: PlanConfig = AS_NEEDED,
    executor: Executor = Executor.streamed,
    facts: Facts | None = None,
) -> peaks.Peaks:
    facts = facts or Facts(phi2(), machine, 4096, 1, 2**20, "lora")
    made = peaks.peaks(allocated, facts, decide(switches(*on), facts), executor, asked)
    assert made is not None
    return made


@pytest.mark.parametrize(("on", "slack"), [((), KNOWN.blocks), (POOL, KNOWN.pages)], ids=["blocks", "pages"])
def test_by_hand(on: tuple[str, ...], slack: Slack) -> None:
    made = found(10 * GIB, device("h100"), *on)
    assert made.ahead_bytes == 0
    assert made.reserved_bytes == pytest.approx(10 * GIB * (1 + slack.share) + slack.rounding_bytes)
    assert made.device_bytes - made.reserved_bytes == pytest.approx(KNOWN.context.bytes)


@pytest.mark.parametrize("on", [(), POOL], ids=["blocks", "pages"])
@pytest.mark.parametrize(("executor", "share"), [(Executor.whole, KNOWN.ahead.whole), (Executor.streamed, KNOWN.ahead.streamed)])
def test_what_is_taken_ahead_is_what_is_reserved(executor: Executor, share: float, on: tuple[str, ...]) -> None:
    made = found(10 * GIB, device("h100"), "fused_loss", "mixed_precision", *on, asked=AHEAD, executor=executor)
    assert made.ahead_bytes == made.reserved_bytes == pytest.approx(10 * GIB * (1 + share))


def test_the_headroom_is_left_free_but_for_gaps() -> None:
    """Near the device's limit, gaps have what the least share of them takes, and never more than there is."""
    machine = device("rtx3090")
    usable, free = machine.memory_usable_bytes, 1 - AHEAD.headroom_fraction
    shares = (0.85, 0.91, 0.95)
    roomy, tight, full = (found(share * usable, machine, *POOL, asked=AHEAD) for share in shares)
    assert [made.ahead_bytes for made in (roomy, tight, full)] == pytest.approx([free * usable, 0.91 * usable * (1 + peaks.GAPS), usable])
    assert all(made.reserved_bytes == made.ahead_bytes for made in (roomy, tight, full))


def test_what_is_needed_decides_where_nothing_is_kept_free() -> None:
    """Below it, and above what is allocated, a step would run out of memory in gaps."""
    machine = device("rtx3090")
    assert peaks.needed_bytes(10 * GIB, machine) == 10 * GIB * (1 + KNOWN.least.share) + KNOWN.least.rounding_bytes
    assert peaks.needed_bytes(10 * GIB, device("cpu")) == 10 * GIB
    config = replace(run_config(), plan=replace(AHEAD, headroom_fraction=0.0))
    made = make_plan(config, machine, phi2(), CORPUS)
    for usable, fits in ((made.needed_bytes, True), (made.needed_bytes - 2, False), (made.total_bytes + 2, False)):
        tight = make_plan(config, replace(machine, memory_usable_bytes=int(usable) + 1), phi2(), CORPUS)
        assert (tight.fits, not tight.shortage) == (fits, fits)


def test_half_precision_logits_are_left_behind() -> None:
    """Under the whole executor, without a fused loss: 2 bytes for each of 4096 tokens and each word."""
    logits, machine = 2 * 4096 * phi2().vocab_size, device("h100")
    kinds = (("mixed_precision",), ("mixed_precision", "fused_loss"), ())
    for pool, asked in itertools.product(((), POOL), (AS_NEEDED, AHEAD)):
        half, fused, single = (found(GIB, machine, *on, *pool, asked=asked, executor=Executor.whole).reserved_bytes for on in kinds)
        assert half - fused == pytest.approx(logits) and single == fused
    facts = Facts(phi2(), machine, 4096, 1, 2**20, "lora")
    assert peaks.left_behind(facts, decide(switches("mixed_precision"), facts), Executor.streamed) == 0


def test_no_more_is_reserved_than_the_device_grants() -> None:
    machine = device("rtx3090")
    usable = machine.memory_usable_bytes
    assert found(0.99 * usable, machine).reserved_bytes == usable
    assert found(2.0 * usable, machine).reserved_bytes == 2.0 * usable


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
    blocks, pages = (found(8 * GIB, device("rtx3090"), *on) for on in ((), POOL))
    assert pages.reserved_bytes < blocks.reserved_bytes


def test_the_plan_says_what_is_taken_before_the_first_step() -> None:
    plain, ahead = (make_plan(replace(run_config(), plan=asked), device("rtx3090"), phi2(), CORPUS) for asked in (AS_NEEDED, AHEAD))
    assert plain.total_bytes == ahead.total_bytes and plain.ahead_bytes == 0
    assert ahead.total_bytes < ahead.ahead_bytes == ahead.reserved_bytes
    assert ["before the first step" in text(made) for made in (plain, ahead)] == [False, True]


def test_a_cpu_has_neither() -> None:
    made = make_plan(run_config(), device("cpu"), phi2(), CORPUS)
    assert made.reserved_bytes is None and made.device_bytes is None
    assert "the driver shows" not in text(made)


def test_every_constant_names_its_source() -> None:
    for part in (KNOWN.blocks, KNOWN.pages, KNOWN.least, KNOWN.ahead, KNOWN.context):
        assert part.source.startswith(("measured: ", "assumption: "))


def test_constants_survive_writing(tmp_path: Path) -> None:
    made = Calibration(
        Slack(0.25, 7.0, "measured: a"),
        replace(KNOWN.pages, share=0.5),
        replace(KNOWN.least, share=0.25),
        Ahead(0.5, 0.25, "assumption: c"),
        Context(3.0, "assumption: b"),
    )
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
