"""A trainer whose steps can be cut off: signals, checkpoints, and the journal between them."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elite import checkpoint
from elite.executor.streamed.attach import attach
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.streamed.journal import JOURNAL
from elite.executor.streamed.mid_step import MidStep
from elite.training.loop import Interrupted, Trainer
from tests.executor.streamed.cut_off import LAYOUT, Done, Killed, works
from tests.training.rig import ALONE, TRAINING, Record, rig, weights


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
