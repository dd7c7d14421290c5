"""Steps with bad numbers: what is passed leaves no trace, and the run is that of a plain loop which passes the same batches."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elite import checkpoint
from elite.callbacks import metrics_file
from elite.config import Schedule, ScheduleConfig
from elite.data.batches import Batch, TrainStream
from elite.distributed.ranks import Ranks
from elite.optimizations.loss_spike_detection import Action, LossSpikeDetection, SpikeDetector
from elite.stability import NonFinite, StabilityConfig, Verdict
from elite.training.loop import Trainer
from elite.training.stability import Setbacks, judged
from elite.training.step import DivergedError, optimizer_step
from tests.distributed.forked import together
from tests.training.rig import TRAINING, Record, rig, weights
from tests.training.test_loop import on

ACCUMULATION, SEQUENCES = 2, 8
STEPS = 12
EVERY_TWO = replace(TRAINING, val_every=4, checkpoint_every=2)
RISING = ScheduleConfig(name=Schedule.linear, warmup_fraction=0.5)
NAN, INF, HIGH = float("nan"), float("inf"), 40.0


class Poisoned:
    """An executor whose losses are multiplied while certain windows of the data are seen, whichever step sees them."""

    def __init__(self, executor: Any, stream: TrainStream, factors: dict[int, float]) -> None:
        self._executor, self._stream, self._factors = executor, stream, factors
        self.model = executor.model

    def loss_sum(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        loss: Tensor = self._executor.loss_sum(batch, keep)
        return loss * self._factors.get(window_of(self._stream), 1.0)


def window_of(stream: TrainStream) -> int:
    """Number, from 1, of the window that was dealt last."""
    state = stream.state()
    return (state["epoch"] * SEQUENCES + state["index"]) // ACCUMULATION


def poisoned(folder: Path, factors: dict[int, float], stability: StabilityConfig, parts: Any = (), **settings: Any) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    trainer = rig(folder, parts, STEPS, training=EVERY_TWO, plan=RISING, **settings)
    trainer.executor = Poisoned(trainer.executor, trainer.stream, factors)
    trainer.stability = stability
    return trainer


def fitted(trainer: Trainer, resumed: int = 0) -> Record:
    record = Record()
    trainer.observers = (metrics_file.MetricsFile(trainer.checkpoints.parent / "metrics.jsonl", resumed), record)
    trainer.fit()
    return record


@dataclass
class Plain:
    """What a plain loop arrived at."""

    weights: list[Tensor]
    optimizer: dict[str, Any]
    rates: list[float] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    tokens: int = 0


def plain(folder: Path, bad: dict[int, float], back: Callable[[int], int] | None) -> Plain:
    """A loop of torch's own parts over the same windows.

    Args:
        bad: windows that are passed.
        back: the step that a rewind from within a step goes back to; None: bad windows count as steps without an update.
    """
    parts = rig(folder, steps=STEPS, training=EVERY_TWO, plan=RISING)
    model, optimizer, scheduler = parts.loaded, parts.optimizer, parts.scheduler
    kept: dict[int, Any] = {}
    made = Plain([], {})
    step, tokens = 0, 0
    while step < STEPS:
        if step not in kept:
            kept[step] = copy.deepcopy(([p.detach() for p in model.trainable], optimizer.state_dict(), scheduler.state_dict(), tokens))
        window = parts.stream.next_window(ACCUMULATION)
        labels = sum(batch.label_tokens for batch in window)
        if window_of(parts.stream) in bad and back is not None:
            step = back(step)
            values, of_optimizer, of_scheduler, tokens = copy.deepcopy(kept[step])
            with torch.no_grad():
                for parameter, value in zip(model.trainable, values, strict=True):
                    parameter.copy_(value)
            optimizer.load_state_dict(of_optimizer)
            scheduler.load_state_dict(of_scheduler)
            kept = {number: one for number, one in kept.items() if number <= step}
            made.rates, made.losses = made.rates[:step], {n: loss for n, loss in made.losses.items() if n <= step}
            continue
        step += 1
        made.rates.append(optimizer.param_groups[0]["lr"])
        if window_of(parts.stream) not in bad:
            total = torch.zeros(())
            for batch in window:
                loss = parts.executor.loss_sum(batch) / labels
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(model.trainable, EVERY_TWO.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            made.losses[step] = total.item()
            tokens += sum(batch.input_ids.numel() for batch in window)
        if step < STEPS:
            scheduler.step()
    made.weights, made.optimizer, made.tokens = weights(parts), optimizer.state_dict(), tokens
    return made


def assert_is(trainer: Trainer, expected: Plain) -> list[dict[str, float]]:
    """The trainer ended, bit for bit, as the plain loop; returns its lines of metrics, which are one a step."""
    assert all(torch.equal(one, two) for one, two in zip(weights(trainer), expected.weights, strict=True))
    state = trainer.optimizer.state_dict()["state"]
    for number, values in expected.optimizer["state"].items():
        assert all(torch.equal(state[number][name], value) for name, value in values.items())
    lines = [line for line in metrics_file.read(trainer.checkpoints.parent / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["lr"] for line in lines] == expected.rates, "the schedule is that of the step's number"
    assert {int(line["step"]): line["loss"] for line in lines if int(line["step"]) in expected.losses} == expected.losses
    assert trainer.progress.step == STEPS and trainer.progress.tokens == expected.tokens
    return lines


def spikes(action: Action = Action.skip) -> Any:
    return on({"loss_spike_detection": {"minimum": 4, "threshold": 30.0, "action": action}})


@pytest.mark.parametrize(
    ("factors", "parts"),
    [({1: NAN}, ()), ({5: NAN, 6: INF, 12: NAN}, ()), ({7: HIGH, 9: NAN}, spikes())],
    ids=["first", "several", "spike"],
)
def test_a_skipped_step_is_a_step_without_an_update(factors: dict[int, float], parts: Any, tmp_path: Path) -> None:
    trainer = poisoned(tmp_path, factors, StabilityConfig(), parts)
    fitted(trainer)
    lines = assert_is(trainer, plain(tmp_path / "plain", factors, None))
    progress = trainer.progress
    high = sum(factor == HIGH for factor in factors.values())
    assert (progress.skipped_steps, progress.spikes, progress.non_finite) == (len(factors), high, len(factors) - high)
    assert progress.skipped_tokens == len(factors) * 2 * 40 and progress.rewinds == 0
    assert [line["skipped_steps"] for line in lines] == [sum(bad <= step for bad in factors) for step in range(1, STEPS + 1)]
    validations = [line["step"] for line in metrics_file.read(tmp_path / "metrics.jsonl") if "val_loss" in line]
    assert validations == [0, 4, 8, 12]


@pytest.mark.parametrize(
    ("factors", "parts"),
    [({6: NAN}, ()), ({1: INF}, ()), ({8: HIGH}, spikes(Action.rewind)), ({4: NAN, 7: NAN, 8: NAN}, ())],
    ids=["within", "before any step", "spike", "twice to one place"],
)
def test_a_rewind_goes_back_in_everything_but_the_data(factors: dict[int, float], parts: Any, tmp_path: Path) -> None:
    trainer = poisoned(tmp_path, factors, StabilityConfig(non_finite=NonFinite.rewind), parts)
    record = fitted(trainer)
    lines = assert_is(trainer, plain(tmp_path / "plain", factors, lambda step: step // 2 * 2))
    assert trainer.progress.rewinds == len(factors) and trainer.progress.skipped_steps == 0 and lines[-1]["rewinds"] == len(factors)
    seen = window_of(trainer.stream) * 2 * 40
    assert trainer.progress.tokens + trainer.progress.skipped_tokens == seen, "no token is lost to the count"
    assert len(record.steps) >= STEPS and [line["step"] for line in record.validations] == [0, 4, 8, 12]


class Killed(Exception):
    """Stands for the end of a process between two steps."""


class KilledAt(Record):
    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def step(self, record: dict[str, float]) -> None:
        super().step(record)
        if len(self.steps) == self._count:
            raise Killed


@pytest.mark.parametrize("count", [9, *(pytest.param(count, marks=pytest.mark.faults) for count in (3, 4, 6, 7, 8, 10, 11))])
@pytest.mark.parametrize("action", Action)
def test_a_run_that_skips_or_rewinds_continues_bit_for_bit(action: Action, count: int, tmp_path: Path) -> None:
    factors = {3: NAN, 9: HIGH}
    stability = StabilityConfig(non_finite=NonFinite[action.value])
    settings: dict[str, Any] = {"parts": spikes(action), "dropout": 0.1}
    whole = poisoned(tmp_path / "whole", factors, stability, **settings)
    fitted(whole)
    first = poisoned(tmp_path / "parts", factors, stability, **settings)
    first.observers = (metrics_file.MetricsFile(tmp_path / "parts" / "metrics.jsonl", 0), KilledAt(count))
    with pytest.raises(Killed):
        first.fit()
    second = poisoned(tmp_path / "parts", factors, stability, **settings)
    second.resume(checkpoint.require_latest(second.checkpoints))
    fitted(second, second.progress.step)
    assert all(torch.equal(one, two) for one, two in zip(weights(second), weights(whole), strict=True))
    assert second.progress == whole.progress and second.stream.state() == whole.stream.state()
    assert [hook.state() for hook in second.hooks] == [hook.state() for hook in whole.hooks]
    assert whole.progress.spikes == 1 and whole.progress.non_finite == 1
    assert told(second) == told(whole)


def told(trainer: Trainer) -> list[str]:
    """Lines of metrics but for what a clock and memory say. As text, for NaN is not equal to itself."""
    measured = {"tokens_per_s", "tflops", "mfu", "host_rss_bytes", "step_time_s", "checkpoint_blocked_s", "checkpoint_s"}
    lines = metrics_file.read(trainer.checkpoints.parent / "metrics.jsonl")
    return [json.dumps({name: value for name, value in line.items() if name not in measured}) for line in lines]


def test_too_many_skips_in_a_row_end_the_run_with_the_last_good_state(tmp_path: Path) -> None:
    factors = dict.fromkeys((2, 4, 5, 6), NAN)
    trainer = poisoned(tmp_path, factors, StabilityConfig(max_skips=2))
    with pytest.raises(DivergedError, match=r"step 6: .*not finite, as in 2 steps before it that were skipped"):
        fitted(trainer)
    kept = checkpoint.require_latest(trainer.checkpoints)
    assert kept.name == "step_000005"
    good = poisoned(tmp_path / "good", {}, StabilityConfig())
    good.resume(kept)
    assert all(torch.equal(one, two) for one, two in zip(weights(good), weights(trainer), strict=True))
    assert good.progress.skipped_in_a_row == 2 and window_of(good.stream) == 5, "the batch that ended it is not passed"
    again = poisoned(tmp_path, factors, StabilityConfig(max_skips=3))
    again.resume(kept)
    fitted(again, 5)
    assert_is(again, plain(tmp_path / "plain", factors, None))


def test_stop_ends_before_the_batch_and_saves(tmp_path: Path) -> None:
    trainer = poisoned(tmp_path, {4: NAN}, StabilityConfig(non_finite=NonFinite.stop))
    with pytest.raises(DivergedError, match=r"step 4: loss nan.*not finite"):
        fitted(trainer)
    again = poisoned(tmp_path, {}, StabilityConfig())
    again.resume(checkpoint.require_latest(trainer.checkpoints))
    assert again.progress.step == 3
    fitted(again, 3)
    assert_is(again, plain(tmp_path / "plain", {}, None))


def test_rewinds_to_one_place_are_bounded(tmp_path: Path) -> None:
    trainer = poisoned(tmp_path, dict.fromkeys(range(5, 40), INF), StabilityConfig(non_finite=NonFinite.rewind, max_rewinds=2))
    with pytest.raises(DivergedError, match="2 rewinds to the checkpoint of step 4 have not helped"):
        fitted(trainer)
    assert trainer.progress.rewinds == 2
    assert checkpoint.require_latest(trainer.checkpoints).name == "step_000004"


@pytest.mark.parametrize("losses", [[9.0, 5.2, 4.8, 5.1, 4.9, 5.0, 5.3], [9.0, *[5.0] * 6]], ids=["spread", "none"])
def test_the_limit_is_median_and_deviation(losses: list[float]) -> None:
    detector = SpikeDetector(LossSpikeDetection.Config(minimum=5, window=6, threshold=6.0))
    for number, loss in enumerate(losses):
        assert detector.limit() == INF or number >= 5
        assert detector.judge(number, loss) is Verdict.take
    window = np.array(losses[1:])
    expected = float(np.median(window) + 6 * 1.4826 * np.median(np.abs(window - np.median(window)))) if len(set(losses)) > 2 else INF
    assert detector.limit() == pytest.approx(expected)
    if expected < INF:
        assert detector.judge(7, expected + 0.01) is Verdict.skip
        assert detector.limit() == pytest.approx(expected), "a spike does not count among what is usual"
        assert detector.judge(8, expected - 0.01) is Verdict.take and detector.limit() != pytest.approx(expected)


def verdicts(config: StabilityConfig, losses: Sequence[float], ranks: Ranks) -> list[str]:
    """What one of several ranks takes these losses for."""
    state, found = Setbacks(), []
    for step, loss in enumerate(losses, start=1):
        try:
            found.append(judged(state, config, (), ranks, step, loss, 1.0, math.isfinite(loss)).value)
        except DivergedError:
            found.append("ended")
    return found


@pytest.mark.parametrize(("policy", "said"), [(NonFinite.skip, "skip"), (NonFinite.rewind, "rewind"), (NonFinite.stop, "ended")])
def test_what_is_bad_on_one_rank_is_bad_on_all(policy: NonFinite, said: str, tmp_path: Path) -> None:
    """Ranks that went separate ways would wait for each other for ever."""
    losses = ((1.0, NAN, 1.0, 1.0), (1.0, 1.0, INF, 1.0))
    config = StabilityConfig(non_finite=policy)
    found = together(tmp_path, 2, lambda ranks, _: verdicts(config, losses[ranks.rank], ranks))
    assert found[0] == found[1] == ["take", said, said, "take"]


class Line(nn.Module):
    """One weight; what is needed of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))


class Scaled:
    """An executor with a loss of choice."""

    def __init__(self, factor: float) -> None:
        self.model: nn.Module = Line()
        self.factor = factor

    def loss_sum(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        return (next(self.model.parameters()) * self.factor).sum()


def fp16_step(executor: Scaled, scaler: torch.amp.GradScaler, verdict: Verdict | None) -> tuple[float, bool]:
    """A step with loss scaling; the scale afterwards, and whether the numbers were fit."""
    optimizer = torch.optim.SGD(executor.model.parameters(), lr=0.1)
    window = [Batch(torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), torch.zeros(1, 2).long(), ((2,),))]
    found: list[bool] = []

    def judge(loss: float, norm: float, fit: bool) -> Verdict:
        found.append(fit)
        return verdict or Verdict.take

    optimizer_step(
        executor, optimizer, scaler, window, list(executor.model.parameters()), 1e9, Ranks(0, 1, torch.device("cpu")), judge=judge
    )
    return scaler.get_scale(), found[0]


def test_the_loss_scale_knows_overflow_from_what_is_skipped() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    good = Scaled(1.0)
    assert fp16_step(good, scaler, None) == (2.0**10, True)
    assert fp16_step(Scaled(5.0), scaler, Verdict.skip) == (2.0**10, True), "what is skipped is no success of the scale"
    assert fp16_step(good, scaler, None) == (2.0**11, True)
    assert next(good.model.parameters()).item() == pytest.approx(1 - 2 * 0.1 / 2), "the loss is a mean over two labels"
    over = Scaled(torch.finfo(torch.float32).max / 2**3)
    assert fp16_step(over, scaler, None) == (2.0**10, True), "an overflow lowers the scale, and is no bad batch"
    assert next(over.model.parameters()).item() == 1.0
    low = torch.amp.GradScaler("cpu", init_scale=0.5)
    over.factor = float("inf")
    assert fp16_step(over, low, Verdict.skip) == (0.5, False), "nothing is left to lower"
