"""The training loop: steps, validations, checkpoints, in that order; observers are told what happened."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LRScheduler

from elite import checkpoint
from elite.config import TrainingConfig
from elite.data.batches import Batch, TrainStream
from elite.distributed.gradients import GradientExchange, gradient_exchange
from elite.distributed.ranks import Ranks
from elite.distributed.watchdog import Beat, no_beat
from elite.errors import CheckpointError
from elite.executor.contract import Executor, StepCut, StepJournal
from elite.executor.streamed.runner import Runner
from elite.model import LoadedModel
from elite.optimizations.contract import Applied
from elite.optimizations.hooks import Hook
from elite.retention import CheckpointConfig
from elite.stability import NonFinite, StabilityConfig, Verdict
from elite.training.recovery import Recovery
from elite.training.saving import Saver
from elite.training.signals import StopRequest
from elite.training.stability import Setbacks, judged, rewound
from elite.training.step import DivergedError, StepResult, optimizer_step
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
class Progress(Setbacks):
    """Where a run stands; part of every checkpoint."""

    step: int = 0
    """Optimizer steps of the schedule, skipped ones included."""
    tokens: int = 0
    """Of the steps that were taken."""
    first_loss: float | None = None
    last_loss: float | None = None
    first_val: dict[str, float] = field(default_factory=dict)
    last_val: dict[str, float] = field(default_factory=dict)
    best_val_loss: float = float("inf")
    best_step: int = 0
    lowest: list[float] = field(default_factory=list)
    """The lowest validation losses after steps, as many as checkpoints are kept for (`checkpoint.keep_best`)."""
    val_step: int = 0
    """Of `last_val`."""
    ended_by: str = ""
    """The hook that asked for the end before the last step."""


class Interrupted(Exception):
    """A signal asked the run to end; a checkpoint of the last finished step is on disk, with a journal what the one at work has done.

    Args:
        number: of the signal.
        step: that was saved.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(number, step)
        self.number, self.step = number, step


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
    """Where they are saved."""
    applied: dict[str, Applied]
    """What the optimizer's and the loop's optimizations touched."""
    hooks: Sequence[Hook] = ()
    """What acts around steps, in this order."""
    observers: Sequence[Observer] = ()
    keep: CheckpointConfig = CheckpointConfig()
    journal: StepJournal | None = None
    """Keeps what the step at work has done (training.mid_step_checkpoint)."""
    progress: Progress = field(default_factory=Progress)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    runner: Runner | None = None
    """Of the streamed executor, if that is what trains."""
    beat: Beat = no_beat
    """Told what begins: the watchdog."""
    carriers: Ranks | None = None
    """Those that carry other sequences, whose losses and gradients are added up; unset: all ranks."""
    saver: Saver = field(init=False)
    recovery: Recovery = field(init=False)
    """What is done where memory runs out."""
    exchange: GradientExchange = field(init=False)
    """Of the executor's model."""

    def __post_init__(self) -> None:
        self.exchange = gradient_exchange(self.executor.model)
        self.saver = Saver(self.checkpoints, self.keep)
        self.recovery = Recovery(self.loaded.trainable, self.ranks, self.runner, self.beat, self.hooks)
        self._request = StopRequest()

    def fit(self) -> Progress:
        """Train to the last step.

        Raises:
            Interrupted: a signal came; the step at work was finished and saved, or cut off with a journal of what it has done.
            DivergedError: steps with bad numbers left no way on; the state before the last of them is saved.
            CheckpointError: the end could not be saved.
        """
        for hook in self.hooks:
            hook.begin()
        with self._request, self.saver:
            self._begin()
            while not self._done:
                if self._stepped():
                    self._after_step()
        return self.progress

    def _begin(self) -> None:
        """Before the first step: where the run starts from, and what a rewind could go back to."""
        if self.progress.step > 0 or self.progress.first_val:
            return
        self._validate()
        rewinds = self.stability.non_finite is NonFinite.rewind or any(hook.may_rewind() for hook in self.hooks)
        # What the first step has done is of use only with what it began from, too.
        if rewinds or self.journal is not None:
            self._save()

    def _after_step(self) -> None:
        """Validate, save and end, as the step at hand asks for."""
        step = self.progress.step
        improved = (step == self.steps or step % self.config.val_every == 0) and self._validate()
        # All ranks must end at one step; each may have got the signal at another.
        stop = int(self.ranks.max(float(self._request.number)))
        asked = self.ranks.max(float(self.ranks.is_main and self.saver.asked())) > 0
        if self._done or stop or improved or asked or step % self.config.saves_every == 0 or self.keep.is_milestone(step):
            self.recovery.again(partial(self._save, asked, last=self._done or stop > 0))
            if self.journal is not None and self._unsaved() is None:
                self.journal.end()
        if stop and not self._done:
            raise Interrupted(stop, step)

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

    def _stepped(self) -> bool:
        """Take the next step; False if the run has gone back to a checkpoint instead: after bad numbers, or where memory ran out in the
        midst of its update."""
        number = self.progress.step + 1
        try:
            return self._step(number)
        except (RuntimeError, MemoryError) as error:
            # What an engine has begun it does not take back.
            may = not self.exchange.in_every_pass and self.recovery.rewinds(error, number)
            last = self._last_saved() if may else None
            if last is None:
                raise
        self.recovery.rewind(number, last.name)
        self.resume(last)
        return False

    def _last_saved(self) -> Path | None:
        """The newest intact checkpoint, the one that is being written included; rank 0 chooses for all."""
        self.saver.settle()
        found: Path | None = self.ranks.broadcast(checkpoint.latest(self.checkpoints) if self.ranks.is_main else None)
        return found

    def _step(self, number: int) -> bool:
        began = time.perf_counter()
        before = self.stream.state()
        self.beat("reading the next batch")
        window = self.stream.next_window(self.accumulation)
        rate = float(self.optimizer.param_groups[0]["lr"])
        state = self.progress
        try:
            result = self._optimizer_step(window, number)
        except DivergedError:
            # A run that continues meets this batch again, under whatever policy it is given then.
            self.stream.load_state(before)
            self._save(last=True)
            raise
        except StepCut as cut:
            raise Interrupted(self._request.number, state.step) from cut
        if result.verdict is Verdict.rewind:
            self._rewind()
            return False
        if self.scheduler.last_epoch < self.steps - 1 and not any(hook.sets_rate(number) for hook in self.hooks):
            self.scheduler.step()
        for hook in self.hooks:
            hook.stepped(number)
        state.step = number
        if result.verdict is Verdict.take:
            state.tokens += result.tokens
            state.last_loss = result.loss
            state.first_loss = result.loss if state.first_loss is None else state.first_loss
        context = window[0].context
        record = {"step": state.step, "tokens": state.tokens, "loss": result.loss, "grad_norm": result.grad_norm, "lr": rate}
        for hook in self.hooks:
            record |= hook.metrics()
        record |= state.counters() | self.recovery.metrics(window[0]) | {"context": context} | self.saver.metrics()
        record |= self.meter.read(result.tokens, context, time.perf_counter() - began)
        for observer in self.observers:
            observer.step(record)
        return True

    def _optimizer_step(self, window: Sequence[Batch], number: int) -> StepResult:
        parameters = self.loaded.trainable

        def of_hooks() -> None:
            for hook in self.hooks:
                hook.gradients(parameters, number)

        def judge(loss: float, norm: float, fit: bool) -> Verdict:
            return judged(self.progress, self.stability, self.hooks, self.ranks, number, loss, norm, fit)

        def attempt() -> None:
            if self.journal is not None:
                self.journal.begin(number, window, self.scaler.get_scale(), lambda: self._request.number > 0)

        result = optimizer_step(
            *(self.executor, self.optimizer, self.scaler, window, parameters, self.config.max_grad_norm, self.carriers or self.ranks),
            before_clipping=of_hooks,
            judge=judge,
            gradients=partial(self.recovery.accumulate, before=attempt),
        )
        if result.verdict is not Verdict.take:
            self.progress.skipped_tokens += result.tokens
        return result

    def _rewind(self) -> None:
        """Go back to the last checkpoint in everything but the data, which goes on behind what has been seen, and the counters."""
        folder = self._last_saved() or checkpoint.require_latest(self.checkpoints)
        setbacks, tokens, position = self.progress, self.progress.tokens, self.stream.state()
        self.resume(folder)
        self.stream.load_state(position)
        self.progress.adopt(setbacks)
        self.progress.skipped_tokens += tokens - self.progress.tokens
        rewound(self.progress, self.stability, self.progress.step)

    def _validate(self) -> bool:
        """Validate; whether its checkpoint is to be kept: the loss is the best so far (the first, before any step, only sets the mark), or
        among the best where several are kept."""
        with self.evaluating():
            losses = self.recovery.again(self.validator, self.validator.longest)
        memory = self.meter.memory()
        state = self.progress
        state.first_val = state.first_val or losses
        state.last_val, state.val_step = losses, state.step
        among_best = state.step > 0 and self._among_best(losses["val_loss"])
        improved = among_best or (losses["val_loss"] < state.best_val_loss and state.step > 0)
        if losses["val_loss"] < state.best_val_loss:
            state.best_val_loss, state.best_step = losses["val_loss"], state.step
        asking = [hook.name for hook in self.hooks if hook.validated(state.step, losses)]
        if asking and state.step < self.steps:
            state.ended_by = asking[0]
        for observer in self.observers:
            observer.validation({"step": state.step, "tokens": state.tokens, **losses, **memory})
        return improved

    def _among_best(self, loss: float) -> bool:
        """Whether a validation loss after a step is among those that checkpoints are kept for; if so it is remembered."""
        known, count = self.progress.lowest, self.keep.keep_best
        among = math.isfinite(loss) and (len(known) < count or (count > 0 and loss < known[-1]))
        if among:
            self.progress.lowest = sorted([*known, loss])[:count]
        return among and count > 1

    def _save(self, asked: bool = False, last: bool = False) -> None:
        """Save in the background; what is to be the last save of this process is waited for.

        Args:
            asked: by a person, who is told when it is there.

        Raises:
            CheckpointError: the last one could not be written.
        """
        self.beat("saving a checkpoint")
        randoms = self.ranks.gather(checkpoint.random_state())
        with self.ranks.meeting("what a checkpoint gathers"):
            of_hooks = {hook.name: kept for hook in self.hooks if (kept := hook.state())}
            of_optimizer = self.exchange.optimizer_state(self.optimizer, self.ranks.is_main)
        progress = self.progress
        if not self.ranks.is_main:
            with self.ranks.meeting("what a checkpoint gathers"):
                self.exchange.take_part(self.loaded)
        else:
            state = {
                "progress": vars(progress),
                "optimizer": of_optimizer,
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "stream": self.stream.state(),
                "random": randoms,
                "hooks": of_hooks,
                "recovery": self.recovery.state(),
            }
            loss = progress.last_val.get("val_loss") if progress.val_step == progress.step else None
            self.saver.save(progress.step, loss, partial(self.exchange.copied, self.loaded), state, asked)
        if last:
            self._settle()

    def _unsaved(self) -> checkpoint.Unsaved | None:
        """What kept the last save from the disk, which is waited for. All ranks learn it: those that write nothing would go on, or wait."""
        unsaved: checkpoint.Unsaved | None = self.ranks.broadcast(self.saver.settle() if self.ranks.is_main else None)
        return unsaved

    def _settle(self) -> None:
        unsaved = self._unsaved()
        if unsaved is None:
            return
        before = checkpoint.latest(self.checkpoints)
        goes_on = f"the same command continues from {before.name}" if before else "nothing had been saved before"
        error = CheckpointError(f"the run's end is not saved: {unsaved.problem}", f"{unsaved.remedy}; {goes_on}")
        error.shown = not self.ranks.is_main
        raise error

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint folder, exactly where it was written."""
        state = checkpoint.load_state(folder)
        self.exchange.load(self.loaded, folder / "model")
        self.exchange.load_optimizer_state(self.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.stream.load_state(state["stream"])
        self.progress = Progress(**state["progress"])
        # Older checkpoints know of none; what acts on this machine alone keeps nothing.
        kept = state.get("hooks", {})
        for hook in self.hooks:
            if hook.name in kept:
                hook.load_state(kept[hook.name])
        if "recovery" in state:
            # Older checkpoints know nothing of it.
            self.recovery.load_state(state["recovery"])
        states = state["random"]
        checkpoint.set_random_state(states[self.ranks.rank % len(states)])
