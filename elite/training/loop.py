"""The training loop: steps, validations, checkpoints, in that order; observers are told what happened."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LRScheduler

from elite import checkpoint
from elite.config import TrainingConfig
from elite.data.batches import TrainStream
from elite.distributed.ranks import Ranks
from elite.distributed.watchdog import Beat, no_beat
from elite.executor.contract import Executor
from elite.executor.streamed.runner import Runner
from elite.model import LoadedModel, load_trained, save_trained
from elite.optimizations.contract import Applied
from elite.optimizations.hooks import Hook
from elite.training.recovery import Recovery
from elite.training.step import optimizer_step
from elite.training.telemetry import Meter
from elite.training.validation import Validator


class Observer(Protocol):
    """Something that is told about a run. Only rank 0 has observers."""

    def step(self, record: dict[str, float]) -> None:
        """After each optimizer step: the line of `metrics.jsonl`."""

    def validation(self, record: dict[str, float]) -> None:
        """After each validation: `step`, `val_loss`, `val_loss_alone`."""

    def end(self, summary: dict[str, Any]) -> None:
        """Once, however the run ends; the summary is empty after a failure."""


@dataclass
class Progress:
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    first_val: dict[str, float] = field(default_factory=dict)
    last_val: dict[str, float] = field(default_factory=dict)
    best_val_loss: float = float("inf")
    best_step: int = 0
    ended_by: str = ""
    """The hook that asked for the end before the last step."""


class Interrupted(Exception):
    """A signal asked the run to end; a checkpoint of the last finished step is on disk."""


@dataclass
class Trainer:
    """Everything one run needs, assembled; `fit` runs it."""

    config: TrainingConfig
    steps: int
    accumulation: int
    loaded: LoadedModel
    executor: Executor
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: Any
    stream: TrainStream
    validator: Validator
    meter: Meter
    ranks: Ranks
    checkpoints: Path
    applied: dict[str, Applied]
    """What the optimizer's and the loop's optimizations touched."""
    hooks: Sequence[Hook] = ()
    """What acts around steps, in this order."""
    observers: Sequence[Observer] = ()
    progress: Progress = field(default_factory=Progress)
    runner: Runner | None = None
    """Of the streamed executor, if that is what trains."""
    beat: Beat = no_beat
    """Told what begins: the watchdog."""
    _stop: bool = False

    def fit(self) -> Progress:
        """Train to the last step.

        Raises:
            Interrupted: a signal came; the step at work was finished and saved.
        """
        for hook in self.hooks:
            hook.begin()
        handlers = {number: signal.signal(number, self._request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            if self.progress.step == 0:
                self._validate()
            while not self._done:
                if not self._stepped():
                    continue
                validates = self.progress.step == self.steps or self.progress.step % self.config.val_every == 0
                improved = validates and self._validate()
                stop = self.ranks.max(float(self._stop)) > 0
                if self._done or stop or improved or self.progress.step % self.config.checkpoint_every == 0:
                    self.recovery.again(self._save)
                if stop and not self._done:
                    raise Interrupted
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return self.progress

    @property
    def _done(self) -> bool:
        return self.progress.step == self.steps or bool(self.progress.ended_by)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within, the model has the weights that are validated and exported."""
        with ExitStack() as stack:
            for hook in self.hooks:
                stack.enter_context(hook.evaluating())
            yield

    def _request_stop(self, number: int, frame: object) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True

    @cached_property
    def recovery(self) -> Recovery:
        """What is done where memory runs out."""
        return Recovery(self.loaded.trainable, self.ranks, self.runner, self.beat)

    def _stepped(self) -> bool:
        """Take the next step; False if memory ran out in the midst of its update, and the run has gone back to its last checkpoint."""
        number = self.progress.step + 1
        try:
            self._step()
            return True
        except (RuntimeError, MemoryError) as error:
            last = checkpoint.latest(self.checkpoints) if self.recovery.rewinds(error, number) else None
            if last is None:
                raise
        self.recovery.rewind(number, last.name)
        self.resume(last)
        return False

    def _step(self) -> None:
        began = time.perf_counter()
        self.beat("reading the next batch")
        window = self.stream.next_window(self.accumulation)
        rate = float(self.optimizer.param_groups[0]["lr"])
        state, parameters, norm = self.progress, self.loaded.trainable, self.config.max_grad_norm
        number = state.step + 1

        def of_hooks() -> None:
            for hook in self.hooks:
                hook.gradients(parameters, number)

        result = optimizer_step(
            self.executor, self.optimizer, self.scaler, window, parameters, norm, self.ranks, of_hooks, gradients=self.recovery.accumulate
        )
        if self.scheduler.last_epoch < self.steps - 1 and not any(hook.sets_rate(number) for hook in self.hooks):
            self.scheduler.step()
        for hook in self.hooks:
            hook.stepped(number)
        state.step = number
        state.tokens += result.tokens
        state.last_loss = result.loss
        state.first_loss = result.loss if state.first_loss is None else state.first_loss
        context = window[0].input_ids.shape[1]
        record = {"step": state.step, "tokens": state.tokens, "loss": result.loss, "grad_norm": result.grad_norm, "lr": rate}
        for hook in self.hooks:
            record |= hook.metrics()
        record |= self.recovery.metrics(window[0])
        record |= {"context": context} | self.meter.read(result.tokens, context, time.perf_counter() - began)
        for observer in self.observers:
            observer.step(record)

    def _validate(self) -> bool:
        """Validate; whether the loss is the best so far (the first, before any step, only sets the mark)."""
        with self.evaluating():
            losses = self.recovery.again(self.validator, self.validator.longest)
        memory = self.meter.memory()
        state = self.progress
        state.first_val = state.first_val or losses
        state.last_val = losses
        improved = losses["val_loss"] < state.best_val_loss and state.step > 0
        if losses["val_loss"] < state.best_val_loss:
            state.best_val_loss, state.best_step = losses["val_loss"], state.step
        asking = [hook.name for hook in self.hooks if hook.validated(state.step, losses)]
        if asking and state.step < self.steps:
            state.ended_by = asking[0]
        for observer in self.observers:
            observer.validation({"step": state.step, "tokens": state.tokens, **losses, **memory})
        return improved

    def _save(self) -> None:
        self.beat("saving a checkpoint")
        randoms = self.ranks.gather(checkpoint.random_state())
        if self.ranks.is_main:
            state = {
                "progress": vars(self.progress),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "stream": self.stream.state(),
                "random": randoms,
                "hooks": {hook.name: hook.state() for hook in self.hooks},
                "recovery": self.recovery.state(),
            }
            checkpoint.save(self.checkpoints, self.progress.step, lambda folder: save_trained(self.loaded, folder), state)
            checkpoint.prune(self.checkpoints, {self.progress.step, self.progress.best_step})
        self.ranks.barrier()

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint folder, exactly where it was written."""
        state = checkpoint.load_state(folder)
        load_trained(self.loaded, folder / "model")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.stream.load_state(state["stream"])
        self.progress = Progress(**state["progress"])
        for hook in self.hooks:
            hook.load_state(state["hooks"][hook.name])
        if "recovery" in state:
            # Older checkpoints know nothing of it.
            self.recovery.load_state(state["recovery"])
        states = state["random"]
        checkpoint.set_random_state(states[self.ranks.rank % len(states)])
