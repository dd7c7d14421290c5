"""Saving while training goes on: what is saved is the state of its step, and no trouble of the disk ends a run that has not ended."""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from elite import checkpoint
from elite.attention import DOCUMENT_EAGER
from elite.checkpoint import disk as disk_module
from elite.errors import CheckpointError
from elite.model import LoadedModel, copy_trained, export, load_trained
from elite.retention import CheckpointConfig
from elite.training.loop import Trainer
from tests.disks import Disk, fill
from tests.models import tiny
from tests.training.rig import TRAINING, Record, adapted, fitted, rig, weights


class At(Record):
    """Does something after a step's line."""

    def __init__(self, **acts: Callable[[], Any]) -> None:
        super().__init__()
        self.acts = {int(name.removeprefix("step")): act for name, act in acts.items()}

    def step(self, record: dict[str, float]) -> None:
        super().step(record)
        if record["step"] in self.acts:
            self.acts[int(record["step"])]()


def trainer_of(folder: Path, steps: int, every: int = 2, keep_all: bool = True) -> Trainer:
    """Saves every so many steps, and at the end; all of these stay, or the last alone."""
    trainer = rig(folder, steps=steps, training=replace(TRAINING, val_every=1000, checkpoint_every=every))
    trainer.keep = CheckpointConfig(keep_best=0, milestone_every=every if keep_all else 0)
    trainer.__post_init__()
    return trainer


def held(monkeypatch: pytest.MonkeyPatch, until: Callable[[], object]) -> None:
    """Writing begins only when `until` returns: a disk that is slow."""
    write = checkpoint.write

    def slow(folder: Path, what: checkpoint.Snapshot) -> Path:
        until()
        return write(folder, what)

    monkeypatch.setattr(checkpoint, "write", slow)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = trainer_of(tmp_path / "one", 5, every=3)
    fitted(undisturbed)
    released = threading.Event()
    held(monkeypatch, lambda: released.wait(60))
    trainer = trainer_of(tmp_path / "two", 5, every=3)
    place = trainer.checkpoints / "step_000003"
    there = list[bool]()

    def release() -> None:
        time.sleep(0.3)
        there.append(place.exists())
        released.set()

    seen = At(step4=release)
    trainer.observers = (seen,)
    trainer.fit()
    assert [line["step"] for line in seen.steps] == [1, 2, 3, 4, 5] and there == [False]
    expected = undisturbed.checkpoints / "step_000003"
    for name in ("model/adapter_model.safetensors", "state.safetensors"):
        assert files(place)[name] == files(expected)[name], name
    later = files(trainer.checkpoints / "step_000005")
    assert later["model/adapter_model.safetensors"] != files(place)["model/adapter_model.safetensors"]
    totals = trainer.saver.totals()
    assert totals["checkpoints_saved"] == 2 and totals["checkpoints_failed"] == 0
    assert totals["checkpoint_s"] > 0.3 > seen.steps[3]["checkpoint_blocked_s"]


def test_a_save_waits_for_the_one_before_and_the_wait_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held(monkeypatch, lambda: time.sleep(0.5))
    trainer = trainer_of(tmp_path, 4, every=1, keep_all=False)
    record = fitted(trainer)
    assert [path.name for path in trainer.checkpoints.iterdir()] == ["step_000004"]
    # Steps take a few milliseconds here: three saves wait for the one before, the end for the last.
    totals = trainer.saver.totals()
    assert 1.6 < totals["checkpoint_blocked_s"] < totals["checkpoint_s"] + 0.5
    assert totals["checkpoint_s"] > 2
    lines = sum(line["checkpoint_blocked_s"] for line in record.steps)
    assert 0.8 < lines < totals["checkpoint_blocked_s"], "the last saves came after the last line"


def test_a_defect_in_the_thread_ends_the_run_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class DefectError(Exception):
        pass

    def fail() -> None:
        raise DefectError("of ours")

    held(monkeypatch, fail)
    trainer = trainer_of(tmp_path, 50, every=2)
    trainer.observers = (At(step3=lambda: time.sleep(0.2)),)
    with pytest.raises(DefectError, match="of ours"):
        trainer.fit()
    # After its save at step 2, before that of step 4 was begun.
    assert trainer.progress.step in (2, 3, 4)


def test_a_run_that_fails_leaves_the_checkpoint_it_was_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ArithmeticError("of the run")

    held(monkeypatch, lambda: time.sleep(0.3))
    trainer = trainer_of(tmp_path, 9)
    trainer.observers = (At(step3=fail),)
    with pytest.raises(ArithmeticError, match="of the run"):
        trainer.fit()
    assert checkpoint.latest(trainer.checkpoints) == trainer.checkpoints / "step_000002"


def test_a_request_is_met_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    request = tmp_path / "checkpoint_now"
    trainer = trainer_of(tmp_path, 6, every=1000)
    found = list[list[str]]()

    def look() -> None:
        time.sleep(0.3)
        found.append(sorted(path.name for path in trainer.checkpoints.glob("step_*")))

    trainer.observers = (At(step3=request.touch, step5=look),)
    trainer.fit()
    assert found == [["step_000003"]] and not request.exists()
    assert [path.name for path in trainer.checkpoints.iterdir()] == ["step_000006"]
    said = [record.getMessage() for record in caplog.records if "checkpoint_now" in record.getMessage()]
    assert len(said) == 2 and said[1].endswith("step_000003 is on the disk")


def test_a_request_that_cannot_be_removed_is_met_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, 6, every=1000)
    (tmp_path / "checkpoint_now").mkdir()
    fitted(trainer)
    assert trainer.saver.totals()["checkpoints_saved"] == 2, "after the first step, and at the end"
    assert caplog.text.count("cannot be removed") == 1


def test_milestones_and_the_best_few_are_saved_without_being_due(tmp_path: Path) -> None:
    training = replace(TRAINING, val_every=1, checkpoint_every=1000, learning_rate=0.3)
    trainer = rig(tmp_path, steps=8, training=training)
    trainer.keep = CheckpointConfig(keep_best=3, milestone_every=3)
    trainer.__post_init__()
    losses = {line["step"]: line["val_loss"] for line in fitted(trainer).validations if line["step"] > 0}
    best = sorted(losses, key=lambda step: losses[step])[:3]
    assert {path.name for path in trainer.checkpoints.iterdir()} == {f"step_{int(step):06d}" for step in {*best, 3, 6, 8}}


def test_a_full_disk_keeps_the_run_and_the_last_checkpoint(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    folder = disk("size=8m")
    undisturbed = trainer_of(tmp_path, 6)
    fitted(undisturbed)
    trainer = trainer_of(folder, 6)
    record = At(step3=lambda: fill(folder, leave_bytes=400_000), step5=(folder / "ballast").unlink)
    trainer.observers = (record,)
    trainer.fit()
    assert sorted(path.name for path in trainer.checkpoints.iterdir()) == ["step_000002", "step_000006"]
    (said,) = (record.getMessage() for record in caplog.records)
    assert "checkpoint of step 4 is not saved" in said and "bytes needed" in said and f"free in {trainer.checkpoints}" in said
    assert "No space left on device" in said and "\n" not in said and "the next save tries again" in said
    assert trainer.saver.totals()["checkpoints_failed"] == 1
    assert all(torch.equal(one, two) for one, two in zip(weights(trainer), weights(undisturbed), strict=True))
    assert all(checkpoint.fault(path) == "" for path in trainer.checkpoints.iterdir())


def test_an_end_that_cannot_be_saved_is_an_error_and_the_one_before_resumes(tmp_path: Path, disk: Disk) -> None:
    folder = disk("size=8m")
    undisturbed = trainer_of(tmp_path, 5)
    fitted(undisturbed)
    trainer = trainer_of(folder, 5)

    def filled() -> None:
        # The save of step 2 may still be at work.
        trainer.saver.settle()
        fill(folder)

    trainer.observers = (At(step3=filled),)
    with pytest.raises(CheckpointError) as raised:
        trainer.fit()
    assert raised.value.exit_code == 2 and len(str(raised.value).splitlines()) == 2
    assert "the run's end is not saved: checkpoint of step 5" in raised.value.problem
    assert "free " in raised.value.remedy and "the same command continues from step_000002" in raised.value.remedy
    (folder / "ballast").unlink()
    again = trainer_of(folder, 5)
    again.resume(checkpoint.require_latest(again.checkpoints))
    assert [line["step"] for line in fitted(again).steps] == [3, 4, 5]
    assert all(torch.equal(one, two) for one, two in zip(weights(again), weights(undisturbed), strict=True))


def write(folder: Path, step: int, save_model: Callable[[Path], None]) -> Path:
    return checkpoint.write(folder, checkpoint.snapshot(step, save_model, {"x": torch.ones(1000)}))


def test_no_file_that_cannot_be_made_leaves_half_a_checkpoint(disk: Disk) -> None:
    folder, saved = disk("size=8m,nr_inodes=40"), 0
    copy = copy_trained(adapted("llama"))
    good = write(folder, 1, copy.save)
    ballast = list[Path]()
    with pytest.raises(OSError):
        for number in range(40):
            ballast.append(folder / f"ballast{number}")
            ballast[-1].touch()
    ballast.pop()
    before = {path.name for path in folder.iterdir()}
    for tries in range(1, len(ballast) + 1):
        with_room = ballast.pop()
        with_room.unlink()
        before.remove(with_room.name)
        try:
            write(folder, 2, copy.save)
        except checkpoint.Unsaved as error:
            assert "No space left on device" in error.problem and "let files of that size be written" in error.remedy
            assert {path.name for path in folder.iterdir()} == before and checkpoint.latest(folder) == good
        else:
            saved = tries
            break
    # A folder each for the checkpoint and its model, four files and more: as many tries failed.
    assert saved > 6 and checkpoint.latest(folder) == folder / "step_000002"


def test_room_that_runs_out_while_it_is_written_leaves_half_of_nothing(disk: Disk) -> None:
    folder = disk("size=8m")
    copy = copy_trained(adapted("llama", rank=64))
    # Adapters are not counted here, as if others took their room meanwhile.
    good = write(folder, 1, copy.save)
    fill(folder, leave_bytes=disk_module.SLACK_BYTES + 100_000)

    def twice(place: Path) -> None:
        copy.save(place)
        (place / "more").write_bytes(bytes(4 * 2**20))

    def by_library(place: Path) -> None:
        place.mkdir()
        export(adapted("llama", rank=64 * 8), place)

    for save_model in (twice, by_library):
        with pytest.raises(checkpoint.Unsaved, match="No space left on device"):
            write(folder, 2, save_model)
        assert {path.name for path in folder.iterdir()} == {"ballast", good.name}
    assert checkpoint.latest(folder) == good


@pytest.mark.parametrize(("number", "words"), [(errno.EDQUOT, "quota"), (errno.EIO, "Input/output error"), (errno.EROFS, "Read-only")])
def test_other_troubles_of_the_disk_are_said_the_same_way(tmp_path: Path, number: int, words: str) -> None:
    def fail(place: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(checkpoint.Unsaved, match=words):
        write(tmp_path, 1, fail)
    assert list(tmp_path.iterdir()) == []


def trained_wholly(**changes: Any) -> LoadedModel:
    core = tiny("llama", DOCUMENT_EAGER, **changes)
    return LoadedModel(core, core, {})


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_of_a_model_is_what_the_library_writes(tmp_path: Path, tied: bool) -> None:
    loaded = trained_wholly(tie_word_embeddings=tied)
    loaded.core.save_pretrained(tmp_path / "library")
    copy = copy_trained(loaded)
    with torch.no_grad():
        for parameter in loaded.trainable:
            parameter.add_(1)
    copy.save(tmp_path / "copy")
    assert files(tmp_path / "copy") == files(tmp_path / "library")
    assert copy.nbytes == sum(parameter.nbytes for parameter in loaded.trainable)
    again = trained_wholly(tie_word_embeddings=tied)
    load_trained(again, tmp_path / "copy")
    AutoModelForCausalLM.from_pretrained(tmp_path / "copy", attn_implementation="eager")


def test_a_copy_of_adapters_is_what_the_library_writes(tmp_path: Path) -> None:
    loaded = adapted("llama")
    export(loaded, tmp_path / "library")
    copy = copy_trained(loaded)
    with torch.no_grad():
        for parameter in loaded.trainable:
            parameter.add_(1)
    copy.save(tmp_path / "copy")
    assert files(tmp_path / "copy") == files(tmp_path / "library")
    assert copy.nbytes == sum(parameter.nbytes for parameter in loaded.trainable)
    base = tiny("llama", "eager", hidden_size=64)
    loaded_by_peft = PeftModel.from_pretrained(base, tmp_path / "copy")
    tensors = load_file(tmp_path / "copy" / "adapter_model.safetensors")
    assert len(tensors) == sum("lora_" in name for name, _ in loaded_by_peft.named_parameters())
