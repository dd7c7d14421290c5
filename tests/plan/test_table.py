from dataclasses import replace

import pytest
from rich.console import Console

from elite.plan import Plan, make_plan, render
from elite.plan.words import count, duration, gib, operations
from tests.plan.helpers import CORPUS, STANDARD, device, phi2, run_config

SECTIONS = ["Run", "Corpus", "Optimizations", "Memory of one GPU", "Steps and time", "Warnings", "Not modelled"]


def text(plan: Plan, width: int = 100) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(render(plan))
    return captured.get()


def plan(context: int = 4096, method: str = "exact") -> Plan:
    return make_plan(run_config(context), device("rtx3090"), phi2(), replace(CORPUS, count_method=method))


@pytest.mark.parametrize("width", [80, 120])
def test_every_section_is_shown(width: int) -> None:
    shown = text(plan(), width)
    assert all(section in shown for section in SECTIONS)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    assert all(name in shown for name in (*STANDARD, "qlora", "adamw_8bit"))
    assert "binary 3" in shown


def test_the_verdict_is_plain() -> None:
    assert "\nFITS, " in text(plan())
    refused = text(plan(262144))
    assert "DOES NOT FIT" in refused
    assert "would fit with: " in refused


def test_estimates_are_labelled() -> None:
    assert "estimated" not in text(plan())
    assert "(estimated from bytes)" in text(plan(method="estimated from bytes"))


def test_hours_a_step_are_said_plainly() -> None:
    assert "One step takes" not in text(plan())
    assert "One step takes" in text(plan(1 << 20))


def test_an_inactive_request_says_why() -> None:
    machine = replace(device("cpu"), supports_bf16=False)
    shown = text(make_plan(run_config(), machine, phi2(), CORPUS), 120)
    assert "requested, inactive: this CPU has no bf16" in shown
    assert "Host memory" in shown


def test_words() -> None:
    assert gib(3 * 1024**3) == "3.00 GiB"
    assert [count(n) for n in (7, 4096, 2.78e9)] == ["7", "4.1 K", "2.78 B"]
    assert [duration(s) for s in (0.5, 5, 600, 7200, 1e6)] == ["500 ms", "5.0 s", "10.0 min", "2.0 h", "11.6 days"]
    assert [operations(n) for n in (5e9, 2e15)] == ["5 GFLOP", "2 PFLOP"]
