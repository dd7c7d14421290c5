"""The training loop with what acts around its steps: a run that stops and continues ends as one that did not."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elite import checkpoint
from elite.config import Schedule, ScheduleConfig
from elite.errors import PlanError
from elite.model import copy_trained, load_trained
from elite.optimizations import OptimizationsConfig, decide
from elite.optimizations.contract import Decision
from elite.training.loop import Interrupted
from tests.optimizations.test_all import BY_NAME, FACTS
from tests.training.rig import TRAINING, Record, every, fitted, rig, weights

GRADIENTS = {
    "gradient_noise": {"eta": 1e-6},
    "gradient_centralization": {},
    "adaptive_gradient_clipping": {"clipping": 0.5},
    "label_smoothing": {},
}
ALL_TOGETHER: dict[str, dict[str, Any]] = {
    **GRADIENTS,
    "lora_plus": {},
    "kernel_warmup": {},
    "lookahead": {"k": 2},
    "ema": {"decay": 0.9},
    "early_stopping": {"patience": 5},
}
AVERAGED: dict[str, dict[str, Any]] = {"swa": {"start": 0.3, "rate": 5e-3, "anneal": 3}, "adamw_8bit": {}, "lookahead": {"k": 4}}


def on(parts: dict[str, dict[str, Any]]) -> tuple[Decision, ...]:
    options: dict[str, Any] = {name: BY_NAME[name].Config(enabled=True, **values) for name, values in parts.items()}
    return decide(replace(OptimizationsConfig(), **options), FACTS)


class StopAt(Record):
    """Sends the signal that a user sends, during a step."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.last = step

    def step(self, record: dict[str, float]) -> None:
        super().step(record)
        if record["step"] == self.last:
            os.kill(os.getpid(), signal.SIGTERM)


SCHEDULE = ScheduleConfig(name=Schedule.one_cycle)


@pytest.mark.parametrize("parts", [{}, ALL_TOGETHER, AVERAGED], ids=["none", "all", "averaged"])
def test_a_run_that_continues_ends_bit_for_bit_the_same(parts: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    decisions, settings = on(parts), {"training": every(TRAINING, 1), "plan": SCHEDULE, "dropout": 0.1, "rank": 64}
    whole = rig(tmp_path / "whole", decisions, **settings)  # type: ignore[arg-type]
    expected = fitted(whole)
    first = rig(tmp_path / "parts", decisions, **settings)  # type: ignore[arg-type]
    seen = StopAt(3)
    first.observers = (seen,)
    with pytest.raises(Interrupted):
        first.fit()
    second = rig(tmp_path / "parts", decisions, **settings)  # type: ignore[arg-type]
    second.resume(checkpoint.require_latest(second.checkpoints))
    assert second.progress.step == 3
    rest = fitted(second)
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in (*seen.steps, *rest.steps)] == [line[name] for line in expected.steps]
    assert [v["val_loss"] for v in (*seen.validations, *rest.validations)] == [v["val_loss"] for v in expected.validations]
    assert all(torch.equal(one, two) for one, two in zip(weights(second), weights(whole), strict=True))
    with second.evaluating(), whole.evaluating():
        assert all(torch.equal(one, two) for one, two in zip(weights(second), weights(whole), strict=True))
    for one, two in zip(second.hooks, whole.hooks, strict=True):
        if one.name != "kernel_warmup":
            assert one.counts() == two.counts()


def test_a_run_without_hooks_continues_from_a_checkpoint_that_knew_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted(rig(tmp_path, steps=2))
    state = checkpoint.load_state(checkpoint.require_latest(tmp_path / "checkpoints"))
    del state["hooks"], state["progress"]["ended_by"]
    monkeypatch.setattr(checkpoint, "load_state", lambda folder: state)
    second = rig(tmp_path, steps=4)
    second.resume(checkpoint.require_latest(tmp_path / "checkpoints"))
    assert fitted(second).steps[-1]["step"] == 4


def test_validation_and_export_see_the_average_and_training_the_weights(tmp_path: Path) -> None:
    plain, averaged = rig(tmp_path / "plain"), rig(tmp_path / "ema", on({"ema": {"decay": 0.9, "warmup": False}}))
    without, record = fitted(plain), fitted(averaged)
    assert [line["loss"] for line in record.steps] == [line["loss"] for line in without.steps]
    assert record.validations[-1]["val_loss"] != without.validations[-1]["val_loss"]
    trained = weights(averaged)
    assert all(torch.equal(one, two) for one, two in zip(trained, weights(plain), strict=True))
    with averaged.evaluating():
        copy_trained(averaged.loaded).save(tmp_path / "final")
    assert all(torch.equal(one, two) for one, two in zip(trained, weights(averaged), strict=True))
    load_trained(plain.loaded, tmp_path / "final")
    assert plain.validator()["val_loss"] == record.validations[-1]["val_loss"]
    assert "moving average" in averaged.hooks[0].exports()


def test_two_averages_are_refused() -> None:
    with pytest.raises(PlanError, match="swa and optimizations.ema both decide the weights that are validated"):
        on({"ema": {}, "swa": {}})


def test_early_stopping_ends_the_run_and_the_best_checkpoint_stays(tmp_path: Path) -> None:
    decisions = on({"early_stopping": {"patience": 2, "min_delta": 0.01}})
    trainer = rig(tmp_path, decisions, steps=40, training=every(replace(TRAINING, learning_rate=3e-2), 2))
    record = fitted(trainer)
    found = [line["val_loss"] for line in record.validations]
    best, idle, expected = found[0], 0, 0
    for position, loss in enumerate(found[1:], start=1):
        idle, best = (0, loss) if loss < best - 0.01 else (idle + 1, best)
        expected = position
        if idle == 2:
            break
    assert trainer.progress.ended_by == "early_stopping"
    assert trainer.progress.step == 2 * expected < 40 and len(found) == expected + 1
    saved = {path.name for path in trainer.checkpoints.iterdir()}
    assert f"step_{trainer.progress.step:06d}" in saved
    if trainer.progress.best_step:
        assert f"step_{trainer.progress.best_step:06d}" in saved
    again = rig(tmp_path, decisions, steps=40, training=every(TRAINING, 2))
    again.resume(checkpoint.require_latest(again.checkpoints))
    assert fitted(again).steps == [], "what has ended goes no further"
