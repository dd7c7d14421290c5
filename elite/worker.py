"""One training process: assemble what the run folder describes, train, leave the results there.

Started by the launcher with the folder as its argument, or called in process under torchrun.
"""

import json
import statistics
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from elite import checkpoint, pretrained, rehearsal, uptraining
from elite.callbacks import metrics_file
from elite.callbacks.screen import Screen
from elite.callbacks.trackers import start_tracker
from elite.compose import show
from elite.console import console, start_logging
from elite.data.batches import Batch, TrainStream
from elite.data.tokens import TokenStore
from elite.data.validation import Completion, completion_example, validation_batches
from elite.distributed.launch import leave_last_words, left_behind
from elite.distributed.ranks import Ranks, joined
from elite.distributed.watchdog import Beat, Watchdog, deadline_seconds
from elite.distributed.zero import loading_device, wrapping
from elite.errors import CheckpointError, EliteError
from elite.executor.build import build, streams_weights
from elite.executor.streamed.attach import Attached
from elite.executor.streamed.mid_step import MidStep
from elite.jsonfile import read_object
from elite.model import LoadedModel, load
from elite.optimizations.contract import Applied
from elite.optimizations.ring_attention import active_variant
from elite.plan import model_flops_per_token
from elite.plan.words import duration, gib
from elite.prepared import Run, corpus_of, prepared
from elite.printable import lines, one_line
from elite.report import endings
from elite.report.run_report import RunReport, convergence
from elite.runfolder import ANOTHER, RunFolder
from elite.training.ahead import Taking
from elite.training.around import loop_hooks
from elite.training.curriculum import course_of
from elite.training.generation import generator
from elite.training.heap import settled
from elite.training.loop import Interrupted, Observer, Progress, Trainer
from elite.training.optimizer import build_optimizer
from elite.training.recovery import Recovery
from elite.training.schedules import schedule
from elite.training.shortage import actual, is_out_of_memory
from elite.training.step import make_scaler
from elite.training.telemetry import Meter, error_percent, paged_bytes, pinned_bytes
from elite.training.validation import Validator

SCRATCH_BYTES = 2**20
"""Less pinned host memory than this is what libraries hold for themselves, and not worth a line."""


def train(folder: RunFolder, ranks: Ranks) -> None:
    """Train the run in `folder` from its beginning or its last checkpoint, and write its results.

    Raises:
        EliteError: the run cannot go on; its checkpoints are intact.
        Interrupted: a signal ended it; its last step is saved.
    """
    with folder.held() if ranks.is_main else nullcontext(), checkpoint.disk_trouble(folder.path):
        _train(folder, ranks)


def _loaded(run: Run) -> LoadedModel:
    # Each rank would write the same base.
    base = run.folder.base if run.ranks.is_main else None
    device = loading_device(run.decisions, run.ranks)
    loaded = load(run.config, run.decisions, run.dtype, device, streams_weights(run.layout), base)
    if base is not None and base.is_dir():
        uptraining.with_tokenizer(run, base)
    torch.manual_seed(run.config.seed + run.carriers.rank)
    return loaded


@dataclass
class _Parts:
    """What exists of a run so far."""

    run: Run
    loaded: LoadedModel | None = None
    trainer: Trainer | None = None


def _train(folder: RunFolder, ranks: Ranks) -> None:
    parts = _Parts(prepared(folder, ranks))
    try:
        with Watchdog(folder.path, ranks, deadline_seconds(parts.run.config.watchdog, parts.run.plan["step_s"])) as beat:
            _carried_out(parts, beat)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        model = parts.loaded.model if parts.loaded else None
        optimizer = parts.trainer.optimizer if parts.trainer else None
        step = parts.trainer.progress.step if parts.trainer else 0
        raise rehearsal.shortage(parts.run, actual(str(error), model, optimizer, ranks.device), step) from error


def _carried_out(parts: _Parts, beat: Beat) -> None:
    # A CPU's rate is an assumption of the planner's; utilisation of an assumption is no measurement.
    device, facts, ranks, folder = parts.run.device, parts.run.facts, parts.run.ranks, parts.run.folder
    meter = Meter(
        ranks,
        lambda context: model_flops_per_token(replace(facts, context=context)) * facts.dividing,
        device.matmul_flops_per_s if device.kind == "cuda" else 0.0,
    )
    store = corpus_of(folder, parts.run.mapped)
    before = uptraining.losses_before(parts.run, *_held_out(parts.run, store)) if uptraining.uptrains(parts.run) else None
    beat("loading the model")
    loaded = parts.loaded = _loaded(parts.run)
    beat("what is tried before the first step")
    run = parts.run = rehearsal.micro_batch_found(parts.run, loaded)
    trainer, attached = _assemble(run, loaded, store, meter, beat)
    parts.trainer = trainer
    completion = _Completion(run, loaded, store, trainer.recovery)
    if folder.begun:
        trainer.resume(checkpoint.require_latest(folder.checkpoints))
    rehearsal.checked(run, loaded, trainer, attached)
    beat("the completion before training")
    if not folder.begun:
        completion.write("before")
    trainer.observers = _observers(run, trainer.progress.step) if ranks.is_main else ()
    summary: dict[str, Any] = {}
    try:
        with settled():
            progress = trainer.fit()
        with trainer.evaluating():
            beat("the run's results")
            completion.write("after")
            if ranks.is_main:
                checkpoint.write_folder(folder.final, trainer.exchange.result(loaded))
            else:
                trainer.exchange.take_part(loaded)
        measured = meter.measured_peak_bytes()
        if ranks.is_main:
            if before is not None:
                uptraining.with_tokenizer(run, folder.final)
            applied = run.applied | loaded.applied | trainer.applied | completion.applied
            acts = {name: act.words for name, act in applied.items()}
            pinned = pinned_bytes(attached.runner.host_bytes() if attached else 0, ranks.device) + paged_bytes(trainer.optimizer)
            summary = _summary(run, progress, meter, measured, pinned) | {"applied": acts} | _of_hooks(trainer) | trainer.saver.totals()
            summary |= trainer.recovery.summary(run.config.tier.context, run.plan["micro_batch"])
            summary |= uptraining.reported(before, progress) if before is not None else {}
    finally:
        for observer in trainer.observers:
            observer.end(summary)
    if ranks.is_main:
        folder.failure.unlink(missing_ok=True)
        checkpoint.write_text(folder.summary, json.dumps(summary, indent=2))
        completion.show()
        _show(summary, folder)
    ranks.barrier()
    trainer.exchange.close()


def _assemble(run: Run, loaded: LoadedModel, store: TokenStore, meter: Meter, beat: Beat) -> tuple[Trainer, Attached | None]:
    """The trainer, and the streamed model if it is one."""
    config, tier, ranks, steps, carriers = run.config, run.config.tier, run.ranks, run.plan["steps"], run.carriers
    shared = active_variant(run.decisions)
    optimizer, applied = build_optimizer(loaded.trainable, run.plan["learning_rate"], config.training, run.decisions, loaded.model)
    wrapped = wrapping(loaded, run.layout, run.decisions, run.facts, run.dtype, optimizer, ranks)
    cache = Path(config.output.cache).expanduser()
    executors = build(loaded, run.layout, run.dtype, run.device, carriers, cache, shared, wrapped)
    attached = executors.attached
    if attached is not None:
        attached.runner.beat = beat
    course = course_of(config, run.plan, store, executors.validation, ranks, run.folder.difficulty, beat, carriers)
    scheduler = schedule(optimizer, config.schedule, steps)
    hooks, of_loop = loop_hooks(
        *(config, run.decisions, executors.training, optimizer, loaded.trainable, steps, ranks.device),
        taking=Taking.of(*(run.plan[name] for name in ("ahead_bytes", "memory"))),
        # Under DDP a rank that fails would leave the others waiting.
        rehearse=lambda: rehearsal.warm(run, loaded, executors),
    )
    trainer = Trainer(
        config=config.training,
        steps=steps,
        accumulation=run.plan["accumulation"],
        loaded=loaded,
        executor=executors.training,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=make_scaler(ranks.device, run.dtype),
        stream=TrainStream(
            *(store, config.data, tier.context, config.training.sequences, config.seed, run.packed, carriers.rank, carriers.world, course),
            sharing=run.facts.sharing,
        ),
        validator=Validator(executors.validation, *_held_out(run, store), carriers, beat, executors.sharing),
        meter=meter,
        ranks=ranks,
        carriers=carriers,
        checkpoints=run.folder.checkpoints,
        applied=applied | of_loop,
        hooks=hooks,
        stability=config.stability,
        keep=config.checkpoint,
        journal=MidStep(attached.runner, loaded.core, run.folder.mid_step, ranks) if attached and attached.runner.layout.journal else None,
        runner=attached.runner if attached else None,
        beat=beat,
    )
    return trainer, attached


def _held_out(run: Run, store: TokenStore) -> tuple[list[Batch], list[Batch]]:
    """The targets that are scored at each validation: with what stands before them, and without."""
    config, tier = run.config, run.config.tier
    with_context, alone = (
        validation_batches(store, tier.context, tier.target_length, config.data.val_sequences, config.seed, with_context=flag)
        for flag in (True, False)
    )
    return with_context, alone


def _observers(run: Run, step: int) -> list[Observer]:
    settings = {"config": asdict(run.config), "plan": run.plan}
    folder, name = run.folder, run.config.name or run.folder.path.name
    tracker = start_tracker(run.config.logger, folder.path, name, folder.read_identity()["tracker_id"], settings, console)
    trackers = [tracker] if tracker else []
    first, screen = metrics_file.MetricsFile(folder.metrics, step), Screen(console, run.plan["steps"], step)
    return [first, *trackers, screen, RunReport(folder, run.plan, console)]


class _Completion:
    """A held-out file completed before and after training, kept in `completion.json`; left out where it does not fit."""

    def __init__(self, run: Run, loaded: LoadedModel, store: TokenStore, recovery: Recovery) -> None:
        config, tokens = run.config, run.config.training.completion_tokens
        self._recovery = recovery
        self.applied: dict[str, Applied] = {}
        """What the optimizations of generation touched."""
        self._file = run.folder.path / "completion.json"
        self._example: Completion | None = None
        self._writes = run.ranks.is_main
        # Ranks that divide layers complete together.
        if (run.ranks.is_main or loaded.divided) and run.facts.generates:
            tokenizer: Any = pretrained.tokenizer(config.model, Path(config.output.cache).expanduser(), download=False)
            self._tokenizer = tokenizer
            # Generation keeps keys and values of all layers, which training need not have room for.
            self._example = completion_example(store, run.plan["generation_tokens"], tokens, config.seed)
            self._generator, self.applied = generator(loaded, run.decisions, run.dtype, run.ranks.device, tokenizer.eos_token_id)

    def write(self, when: str) -> None:
        """Complete now and record it as `before` or `after`."""
        if self._example is None:
            return
        example, decode = self._example, self._tokenizer.decode
        try:
            (found,) = self._recovery.again(lambda: self._generator(example.prompt, len(example.reference)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # A sample of text is no reason to lose a run.
            console.print(f"no completion {when} training: out of memory")
            return
        if not self._writes:
            return
        text = decode(found, skip_special_tokens=True)
        known = read_object(self._file, CheckpointError, ANOTHER) if self._file.exists() else {}
        known |= {"path": example.path, "prompt_end": decode(example.prompt[-64:]), "reference": decode(example.reference), when: text}
        self._file.write_text(json.dumps(known, indent=2))

    def show(self) -> None:
        """Print prompt, reference and both completions."""
        if self._example is None or not self._file.exists():
            return
        known = json.loads(self._file.read_text())
        # Paths and texts of a repository, or of the model: not markup, and nothing that steers the terminal.
        console.print(Text.assemble("\n", ("Completion of held-out", "bold"), f" {one_line(known['path'])}"))
        for title in ("prompt_end", "reference", "before", "after"):
            if title in known:
                console.print(f"[dim]── {title.replace('_', ' ')}[/]")
                console.print(lines(known[title]), markup=False)


def _summary(run: Run, progress: Progress, meter: Meter, measured_peak_bytes: float, pinned_bytes: float) -> dict[str, Any]:
    steps = [line for line in metrics_file.read(run.folder.metrics) if "loss" in line]
    plan = run.plan
    last = [line for line in steps if line["step"] > plan["stages"][-1]["first_step"]] or steps
    # A stage's first step allocates and compiles; it says nothing about the others. What was planned is the last stage's.
    timed = last[1:] or last
    seconds = statistics.median(line["step_time_s"] for line in timed)
    # One that was cut off after its last checkpoint takes no step.
    highest = meter.highest or meter.memory()
    return {
        "name": run.config.name or run.folder.path.name,
        "steps": progress.step,
        "tokens": progress.tokens,
        "micro_batch": plan["micro_batch"],
        "learning_rate": plan["learning_rate"],
        "train_loss_first": progress.first_loss,
        "train_loss_last": progress.last_loss,
        "val_first": progress.first_val,
        "val_last": progress.last_val,
        "best_val_loss": progress.best_val_loss,
        "best_step": progress.best_step,
        **progress.counts(),
        "predicted_peak_bytes": plan["total_bytes"],
        "measured_peak_bytes": measured_peak_bytes,
        "predicted_reserved_bytes": plan["reserved_bytes"],
        "reserved_peak_bytes": highest["gpu_reserved_bytes"],
        "predicted_host_pinned_bytes": plan["host_bytes"],
        "host_pinned_bytes": pinned_bytes,
        "host_rss_peak_bytes": highest["host_rss_bytes"],
        "predicted_step_s": plan["step_s"],
        "step_s": seconds,
        "errors_percent": {
            "peak": error_percent(plan["total_bytes"], measured_peak_bytes),
            "reserved": error_percent(plan["reserved_bytes"] or 0.0, highest["gpu_reserved_bytes"]),
            "host_pinned": error_percent(plan["host_bytes"], pinned_bytes),
            "step": error_percent(plan["step_s"], seconds),
        },
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in timed),
        "train_time_s": sum(line["step_time_s"] for line in steps),
        "convergence": convergence(steps).to_dict(),
    }


def _of_hooks(trainer: Trainer) -> dict[str, Any]:
    """What acted around the steps, which weights `final/` holds, and why the run ended before its last step if it did."""
    progress = trainer.progress
    best = trainer.checkpoints / f"step_{progress.best_step:06d}"
    exports = [hook.exports() for hook in trainer.hooks if hook.exports()]
    return {
        "acted": {hook.name: hook.counts() for hook in trainer.hooks},
        "final_weights": exports[-1] if exports else endings.TRAINED,
        "ended_by": progress.ended_by,
        "planned_steps": trainer.steps,
        "best_checkpoint": str(best) if best.is_dir() else None,
    }


def _show(summary: dict[str, Any], folder: RunFolder) -> None:
    first, last, errors = summary["val_first"], summary["val_last"], summary["errors_percent"]
    worth = [losses["val_loss_alone"] - losses["val_loss"] for losses in (first, last)]
    reserved = f", {gib(summary['reserved_peak_bytes'])} reserved" if summary["reserved_peak_bytes"] else ""
    pinned = ""
    if max(summary["host_pinned_bytes"], summary["predicted_host_pinned_bytes"]) >= SCRATCH_BYTES:
        planned = gib(summary["predicted_host_pinned_bytes"])
        pinned = f", of it pinned {gib(summary['host_pinned_bytes'])}, {planned} planned{_off(errors['host_pinned'])}"
    unusual = "".join(f"{line}\n" for line in endings.unusual(summary))
    console.print(
        f"\n{summary['steps']} steps, {summary['tokens']:,} tokens, {summary['tokens_per_s']:,.0f} tokens/s\n"
        f"validation loss  {first['val_loss']:.4f} → {last['val_loss']:.4f}   alone {first['val_loss_alone']:.4f} → "
        f"{last['val_loss_alone']:.4f}   context is worth {worth[0]:+.4f} → {worth[1]:+.4f}\n{uptraining.words(summary)}"
        f"peak memory  {gib(summary['measured_peak_bytes'])} measured, {gib(summary['predicted_peak_bytes'])} planned"
        f"{_off(errors['peak'])}{reserved}; host {gib(summary['host_rss_peak_bytes'])}{pinned}\n"
        f"step time    {duration(summary['step_s'])} measured, {duration(summary['predicted_step_s'])} planned{_off(errors['step'])}\n"
        f"convergence  {summary['convergence']['words']}\n"
        f"{unusual}results in {folder.path}, on one page in report.html",
    )


def _off(percent: float | None) -> str:
    return "" if percent is None else f" ({percent:+.1f} %)"


def main() -> None:
    """The process's edge: an error is shown here and left in the folder, and its exit code tells the parent so."""
    start_logging()
    folder = Path(sys.argv[1])
    try:
        with joined() as ranks:
            train(RunFolder(folder), ranks)
    except EliteError as error:
        show(error)
        leave_last_words(folder, error.problem)
        sys.exit(error.exit_code)
    except Interrupted as error:
        sys.exit(left_behind(folder, error.number, error.step))
    except Exception as error:
        leave_last_words(folder, f"{type(error).__name__}: {error}".splitlines()[0])
        raise
