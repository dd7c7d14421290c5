"""A streamed step that is cut off anywhere goes on where it was: the same gradients, bit for bit, and at most a layer is lost."""

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from elite import checkpoint
from elite.data.batches import Batch, random_batch
from elite.executor.contract import StepCut
from elite.executor.streamed import files
from elite.executor.streamed.attach import attach
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.streamed.journal import EMBED, HEAD, JOURNAL, forward_stage
from elite.executor.streamed.mid_step import MidStep
from elite.streaming import Keep, Place, Streaming
from elite.training.loop import Interrupted, Trainer
from tests.executor.streamed.exactness import VOCABULARY
from tests.models import tiny
from tests.training.rig import ALONE, TRAINING, Record, rig, weights

LAYERS, TOKENS, TAIL, PASSES, LABELS = 3, 22, 5, 2, 40
LAYOUT = Streaming(chunk=16, block=7, keep=Keep.layers, boundaries=Place.disk, journal=True)
OF_A_LAYER = 5 + 4
"""Calls in a layer's backward: documents of 22, 17 and 5 tokens are two chunks, two and one; keys of the first four are made before."""
REFILLED = 2
"""Calls more where a process ends between a document's last forward and its first backward, which leave their keys to each other."""


class Killed(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@dataclass
class Done:
    """What a process did before it ended."""

    gradients: dict[str, Tensor] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    calls: int = 0
    """Of layers, on chunks."""
    stages: int = 0


@dataclass(frozen=True)
class Case:
    """A step of two micro-batches."""

    layout: Streaming = LAYOUT
    full: bool = False
    dtype: torch.dtype = torch.float32
    number: int = 5
    seed: int = 11
    rows: int = 2
    tail: int = TAIL
    tokens: int = 2
    """Seed of the batches."""

    def model(self) -> Any:
        core = tiny("llama", num_hidden_layers=LAYERS)
        if self.full:
            return core
        core.requires_grad_(False)
        torch.manual_seed(4)
        options = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2, task_type="CAUSAL_LM", init_lora_weights=False)
        return get_peft_model(core, options).train()

    def window(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(self.tokens)
        return [random_batch(self.rows, TOKENS, VOCABULARY, generator, self.tail) for _ in range(PASSES)]

    def process(self, folder: Path, call: int | None = None, stage: int | None = None, factor: float = 1.0) -> Done:
        """The step from its beginning, or from what an earlier process has left in `folder`, with everything else made anew.

        Args:
            call: ends at this call of a layer, from 0.
            stage: is asked to stop in this stage, from 1.
            factor: of the trained weights.
        """
        model, done = self.model(), Done()
        core = model if self.full else model.get_base_model()
        for parameter in model.parameters():
            parameter.data.mul_(factor if parameter.requires_grad else 1)
        attached = attach(model, replace(self.layout, folder=str(folder / "others")))
        journal, executor = MidStep(attached.runner, core, folder / "mid_step", ALONE), StreamedExecutor(model, self.dtype)
        window = self.window()

        def stopping() -> bool:
            done.stages += 1
            return done.stages == stage

        torch.manual_seed(self.seed)
        with counted(core.model.layers, done, call):
            try:
                journal.begin(self.number, window, 1.0, stopping)
                for batch in window:
                    loss = executor.loss_sum(batch) / LABELS
                    loss.backward()
                    done.losses.append(loss.detach())
            except (Killed, StepCut) as end:
                assert isinstance(end, Killed) == (stage is None)
                return done
        assert call is None and stage is None, "never reached"
        done.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        journal.end()
        assert not (folder / "mid_step").exists()
        return done


def works(arguments: dict[str, Any]) -> bool:
    """Whether a layer is called on a chunk: not for the decoder's arguments, nor to be tried on a few tokens."""
    return "work" in arguments and arguments["work"].chunk.index >= 0


@contextmanager
def counted(layers: nn.ModuleList, done: Done, last: int | None) -> Iterator[None]:
    """Within, calls of layers on chunks are counted; at number `last` the process ends."""

    def before(_layer: nn.Module, _inputs: Any, arguments: dict[str, Any]) -> None:
        if works(arguments):
            if done.calls == last:
                raise Killed
            done.calls += 1

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    yield
    for hook in hooks:
        hook.remove()


def assert_equal(found: Done, expected: Done) -> None:
    """Losses and all gradients, bit for bit."""
    assert len(found.losses) == PASSES and found.gradients.keys() == expected.gradients.keys()
    assert all(torch.equal(one, two) for one, two in zip(found.losses, expected.losses, strict=True))
    for name, gradient in expected.gradients.items():
        assert gradient.abs().max() > 0 and torch.equal(found.gradients[name], gradient), name


CASES = {
    "layers": Case(),
    "attention": Case(replace(LAYOUT, keep=Keep.attention)),
    "bf16": Case(dtype=torch.bfloat16),
    "keys on the host": Case(replace(LAYOUT, keep=Keep.attention, keys_values=Place.host), dtype=torch.bfloat16),
    "full": Case(full=True),
}
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


@cache
def undisturbed(case: Case, factor: float = 1.0) -> Done:
    """The step in one go."""
    with TemporaryDirectory() as folder:
        return case.process(Path(folder), factor=factor)


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
def test_a_step_stopped_after_any_stage_goes_on(case: Case, tmp_path: Path) -> None:
    whole = undisturbed(case)
    for stage in range(1, whole.stages + 1):
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


def test_a_step_killed_inside_a_layer_goes_on(tmp_path: Path) -> None:
    killed_anywhere(CASES["layers"], tmp_path, lambda calls: range(3, calls, 22))


@pytest.mark.faults
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_killed_at_any_call_of_a_layer_goes_on(case: Case, tmp_path: Path) -> None:
    killed_anywhere(case, tmp_path, lambda calls: range(0, calls, 3))


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


def trained(folder: Path, calls: Done, last: int | None = None) -> Trainer:
    """Three steps of two micro-batches each, their progress kept; the process ends or is told to end at a call of a layer."""
    made = rig(folder, steps=3, training=replace(TRAINING, mid_step_checkpoint=True), dropout=0.1)
    layout = replace(LAYOUT, folder=str(folder / "others"))
    attached = attach(made.loaded.model, layout)
    made.executor = StreamedExecutor(made.loaded.model, torch.float32)
    made.journal = MidStep(attached.runner, made.loaded.core, folder / "mid_step", ALONE)

    def before(_layer: nn.Module, _inputs: Any, arguments: dict[str, Any]) -> None:
        if works(arguments) and torch.is_grad_enabled():
            calls.calls += 1
            if calls.calls == last:
                os.kill(os.getpid(), signal.SIGTERM)

    for layer in made.loaded.core.model.layers:
        layer.register_forward_pre_hook(before, with_kwargs=True)
    return made


def continued(folder: Path, calls: Done) -> tuple[Trainer, Record]:
    made, record = trained(folder, calls), Record()
    made.resume(checkpoint.require_latest(folder / "checkpoints"))
    made.observers = (record,)
    made.fit()
    return made, record


def test_a_signal_cuts_the_step_at_work(tmp_path: Path) -> None:
    whole, record = trained(tmp_path / "whole", Done()), Record()
    whole.observers = (record,)
    whole.fit()
    assert not (tmp_path / "whole" / "mid_step").exists()
    # In the backward of the first step, and of the second one.
    for last in (5, 17):
        folder = tmp_path / str(last)
        cut = trained(folder, Done(), last)
        with pytest.raises(Interrupted):
            cut.fit()
        assert cut.progress.step == last // 12 and (folder / "mid_step" / "rank0" / JOURNAL).is_file()
        again, seen = continued(folder, Done())
        assert all(torch.equal(one, two) for one, two in zip(weights(again), weights(whole), strict=True))
        assert [line["loss"] for line in seen.steps] == [line["loss"] for line in record.steps][cut.progress.step :]
        assert not (folder / "mid_step").exists()


def test_a_step_is_kept_until_its_checkpoint_is(tmp_path: Path) -> None:
    class Ends(Record):
        """Ends the process between a step and its checkpoint."""

        def step(self, record: dict[str, float]) -> None:
            if record["step"] == 2:
                raise Killed

    whole, two_steps, last_step = trained(tmp_path / "whole", Done()), Done(), Done()
    whole.fit()
    first = trained(tmp_path / "cut", two_steps)
    first.observers = (Ends(),)
    with pytest.raises(Killed):
        first.fit()
    again, seen = continued(tmp_path / "cut", last_step)
    assert [line["step"] for line in seen.steps] == [2, 3]
    assert all(torch.equal(one, two) for one, two in zip(weights(again), weights(whole), strict=True))
    assert last_step.calls == two_steps.calls // 2, "the second step's layers have nothing left to do"
