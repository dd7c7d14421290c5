"""A streamed step that is cut off anywhere goes on where it was: the same gradients, bit for bit, and at most a layer is lost."""

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elite.executor.contract import StepCut
from elite.executor.streamed import files
from elite.executor.streamed.attach import attach
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.streamed.journal import EMBED, HEAD, JOURNAL, forward_stage
from elite.executor.streamed.mid_step import MidStep
from elite.streaming import Place
from tests.executor.streamed.cut_off import (
    CASES,
    LABELS,
    LAYERS,
    LAYOUT,
    OF_A_LAYER,
    PASSES,
    REFILLED,
    Case,
    Done,
    assert_equal,
    undisturbed,
)
from tests.training.rig import ALONE

CHEAP = ("layers", "full")
MARKED = [pytest.param(case, id=name, marks=() if name in CHEAP else pytest.mark.faults) for name, case in CASES.items()]
"""The others take as long, and are left to `make test-faults`."""


@pytest.mark.parametrize("case", MARKED)
def test_a_journal_changes_nothing(case: Case, tmp_path: Path) -> None:
    kept = case.process(tmp_path)
    model = case.model()
    plain = replace(case.layout, journal=False, boundaries=Place.host)
    attach(model, plain)
    torch.manual_seed(case.seed)
    executor, losses = StreamedExecutor(model, case.dtype), []
    for batch in case.window():
        loss = executor.loss_sum(batch) / LABELS
        loss.backward()
        losses.append(loss.detach())
    assert_equal(kept, Done({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, losses))


@pytest.mark.parametrize("case", MARKED)
def test_a_step_stopped_after_every_stage_goes_on(case: Case, tmp_path: Path) -> None:
    whole, calls = undisturbed(case), 0
    assert whole.stages == PASSES * (2 * LAYERS + 2 + case.full)
    for _ in range(whole.stages):
        one = case.process(tmp_path, stage=1)
        assert one.stages == 1
        calls += one.calls
    last = case.process(tmp_path)
    assert_equal(last, whole)
    # No layer is passed twice.
    assert last.calls == last.stages == 0 and calls <= whole.calls + PASSES * REFILLED


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_stopped_once_goes_on(case: Case, tmp_path: Path) -> None:
    whole = undisturbed(case)
    for stage in range(2, whole.stages + 1, 3):
        first = case.process(tmp_path / str(stage), stage=stage)
        again = case.process(tmp_path / str(stage))
        assert_equal(again, whole)
        assert (first.stages, again.stages) == (stage, whole.stages - stage) and first.calls + again.calls <= whole.calls + REFILLED


def killed_anywhere(case: Case, folder: Path, calls: Callable[[int], range]) -> None:
    """End a process at these calls of all, and of every other one the process after it as well."""
    whole = undisturbed(case)
    for call in calls(whole.calls):
        here = folder / str(call)
        first = case.process(here, call=call)
        second = case.process(here, call=5) if call % 2 and whole.calls - call > 3 * OF_A_LAYER else Done()
        again = case.process(here)
        assert_equal(again, whole)
        lost = first.calls + second.calls + again.calls - whole.calls
        assert lost <= (1 + (second.calls > 0)) * (OF_A_LAYER + REFILLED), f"killed at {call}, {lost} calls lost"


@pytest.mark.faults
def test_a_step_killed_inside_a_layer_goes_on(tmp_path: Path) -> None:
    killed_anywhere(CASES["layers"], tmp_path, lambda calls: range(3, calls, 22))


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_killed_at_many_calls_of_layers_goes_on(case: Case, tmp_path: Path) -> None:
    killed_anywhere(case, tmp_path, lambda calls: range(1, calls, 9))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a step stopped in the backward of its first micro-batch has left."""
    folder = tmp_path_factory.mktemp("half")
    Case().process(folder, stage=6)
    return folder


@pytest.fixture
def half_done(half: Path, tmp_path: Path) -> Path:
    """The same, to do as one likes with."""
    shutil.copytree(half / "mid_step", tmp_path / "mid_step")
    return tmp_path / "mid_step" / "rank0"


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "journal": (lambda here: flipped(here / JOURNAL), "is damaged (journal.json)"),
    "half a journal": (lambda here: os.truncate(here / JOURNAL, 100), "is damaged (journal.json)"),
    "no JSON": (lambda here: (here / JOURNAL).write_bytes(b"\xff\x00"), "is damaged (journal.json)"),
    "another tool's": (lambda here: (here / JOURNAL).write_text("[]"), "is damaged (journal.json)"),
    "boundary": (lambda here: flipped(here / "slot1"), "is damaged (slot1)"),
    "gradient": (lambda here: flipped(here / "live"), "is damaged (live)"),
    "short boundary": (lambda here: os.truncate(here / "slot0", 7), "is damaged (slot0)"),
    "no boundary": (lambda here: (here / "slot1").unlink(), "is incomplete (slot1)"),
    "result": (lambda here: flipped(here / "pass0_backward_2.safetensors"), "is damaged (pass0_backward_2.safetensors)"),
    "no loss": (lambda here: (here / "pass0_head.safetensors").unlink(), "is incomplete (pass0_head.safetensors)"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_journal_is_dropped(
    damage: Callable[[Path], object], words: str, half_done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(half_done)
    with caplog.at_level(logging.INFO, "elite.executor"):
        Case().process(tmp_path, stage=1)
    assert caplog.messages == [f"step 5 begins anew: what was kept of a step at work {words}"]
    (entry,) = files.read_json(half_done / JOURNAL)["passes"]
    assert list(entry["stages"]) == ["embed"], "something of it was used"
    assert_equal(Case().process(tmp_path), undisturbed(Case()))


OTHERS: dict[str, tuple[dict[str, Any], float, str]] = {
    "step": ({"number": 6}, 1.0, "is of step 5"),
    "weights": ({}, 1.001, "is of other weights"),
    "batches": ({"tokens": 3}, 1.0, "is of other batches"),
    "layout": ({"layout": replace(LAYOUT, chunk=8)}, 1.0, "is of other layout"),
}


@pytest.mark.parametrize(("changes", "factor", "words"), OTHERS.values(), ids=OTHERS)
def test_a_journal_of_another_step_is_dropped(
    changes: dict[str, Any], factor: float, words: str, half_done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = replace(Case(), **changes)
    whole = undisturbed(other, factor)
    with caplog.at_level(logging.INFO, "elite.executor"):
        again = other.process(tmp_path, factor=factor)
    assert_equal(again, whole)
    assert caplog.messages == [f"step {other.number} begins anew: what was kept of a step at work {words}"]


def test_other_random_numbers_begin_their_micro_batch_anew(half_done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = Case(seed=12)
    with caplog.at_level(logging.INFO, "elite.executor"):
        assert_equal(other.process(tmp_path), undisturbed(other))
    assert "micro-batch 1 begins anew: what was kept of it is of other tokens or random numbers" in caplog.messages


def test_files_that_a_kill_left_behind_do_no_harm(half_done: Path, tmp_path: Path) -> None:
    whole, here = undisturbed(Case()), half_done
    (here / "journal.partial").write_text("{")
    (here / "pass1_backward_2.safetensors").write_bytes(b"torn")
    (here / "slot2").write_bytes(bytes((here / "slot2").stat().st_size))
    again = Case().process(tmp_path)
    assert_equal(again, whole)
    assert again.stages == whole.stages - 6


def test_a_step_tried_again_in_one_process_goes_on(tmp_path: Path) -> None:
    # One document, so that the last layer's backward begins with the keys that its forward has left.
    case = Case(full=True, rows=1, tail=0)
    model = case.model()
    attached = attach(model, replace(case.layout, folder=str(tmp_path / "others")))
    journal, executor = MidStep(attached.runner, model, tmp_path / "mid_step", ALONE), StreamedExecutor(model, case.dtype)
    window, losses, stages = case.window(), [], iter([EMBED, *map(forward_stage, range(LAYERS)), HEAD])
    torch.manual_seed(case.seed)
    random = torch.get_rng_state()
    journal.begin(case.number, window, 1.0, lambda: next(stages) == HEAD)
    with pytest.raises(StepCut):
        executor.loss_sum(window[0])
    # What lies in memory is another pass's now.
    attached.runner.journal = None
    executor.loss_sum(window[1]).detach_()
    torch.set_rng_state(random)
    journal.begin(case.number, window, 1.0, lambda: False)
    for batch in window:
        losses.append(executor.loss_sum(batch) / LABELS)
        losses[-1].backward()
    found = Done({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, losses)
    assert_equal(found, undisturbed(case))
    journal.end()
