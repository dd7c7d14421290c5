"""One training process: assemble what the run folder describes, train, leave the results there.

Started by the launcher with the folder as its argument, or called in process under torchrun.
"""

import json
import os
import statistics
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from elite import checkpoint, geometry, hardware, pretrained
from elite.callbacks import metrics_file
from elite.callbacks.screen import Screen
from elite.callbacks.trackers import start_tracker
from elite.compose import show
from elite.config import Cap, RunConfig, from_yaml
from elite.console import console, start_logging
from elite.data.batches import TrainStream
from elite.data.tokens import TokenStore, open_store
from elite.data.validation import completion_example, validation_batches
from elite.distributed.ranks import Ranks, joined
from elite.errors import DataError, EliteError
from elite.executor.build import build, streams_weights
from elite.facts import Device, Facts
from elite.model import LoadedModel, apply_stage, load, save_trained
from elite.optimizations import decide
from elite.optimizations.contract import Applied, Decision, Stage
from elite.optimizations.targets import BatchLayout, Runtime
from elite.plan import facts_of, model_flops_per_token
from elite.plan.words import gib
from elite.runfolder import RunFolder
from elite.streaming import Streaming
from elite.training.heap import settled
from elite.training.loop import Interrupted, Observer, Progress, Trainer
from elite.training.optimizer import build_optimizer
from elite.training.schedules import schedule
from elite.training.step import make_scaler
from elite.training.telemetry import Meter
from elite.training.validation import Validator, complete


def train(folder: RunFolder, ranks: Ranks) -> None:
    """Train the run in `folder` from its beginning or its last checkpoint, and write its results.

    Raises:
        EliteError: the run cannot go on; its checkpoints are intact.
        Interrupted: a signal ended it; its last step is saved.
    """
    with folder.held() if ranks.is_main else nullcontext():
        _train(folder, ranks)


@dataclass(frozen=True)
class _Run:
    """What every part of a run needs to know."""

    config: RunConfig
    plan: dict[str, Any]
    device: Device
    facts: Facts
    decisions: tuple[Decision, ...]
    dtype: torch.dtype
    """Of matrix products and frozen weights."""
    packed: bool
    applied: dict[str, Applied]
    """What the optimizations of batch layout and dtype touched."""
    folder: RunFolder
    ranks: Ranks

    @property
    def layout(self) -> Streaming | None:
        """Of the streamed executor; None under the whole one."""
        plain = self.plan["layout"]
        return Streaming.from_dict(plain) if plain else None


def _prepared(folder: RunFolder, ranks: Ranks) -> _Run:
    """What the folder describes, with this process made ready for it."""
    config, plan = from_yaml(folder.config), json.loads(folder.plan.read_text())
    device = hardware.device(config.hardware)
    facts = facts_of(config, device, geometry.shape(config.model), plan["executor"])
    decisions = decide(config.optimizations, facts)
    prepare_process(config, ranks, device)
    batches = BatchLayout()
    applied = apply_stage(Stage.data, decisions, batches)
    dtype, of_dtype = compute_dtype(decisions, device)
    applied |= of_dtype
    return _Run(config, plan, device, facts, decisions, dtype, batches.packed, applied, folder, ranks)


def _loaded(run: _Run) -> LoadedModel:
    loaded = load(run.config, run.decisions, run.dtype, run.ranks.device, streams_weights(run.layout))
    torch.manual_seed(run.config.seed + run.ranks.rank)
    return loaded


def _train(folder: RunFolder, ranks: Ranks) -> None:
    run = _prepared(folder, ranks)
    # A CPU's rate is an assumption of the planner's; utilisation of an assumption is no measurement.
    peak = run.device.matmul_flops_per_s if run.device.kind == "cuda" else 0.0
    meter = Meter(ranks, model_flops_per_token(run.facts), peak)
    loaded = _loaded(run)
    store = _tokens(folder)
    trainer = _assemble(run, loaded, store, meter)
    completion = _Completion(run, loaded, store)
    if folder.begun:
        trainer.resume(checkpoint.require_latest(folder.checkpoints))
    else:
        completion.write("before")
    trainer.observers = _observers(run, trainer.progress.step) if ranks.is_main else ()
    summary: dict[str, Any] = {}
    try:
        with settled():
            progress = trainer.fit()
        completion.write("after")
        measured = meter.measured_peak_bytes()
        if ranks.is_main:
            save_trained(loaded, folder.final)
            applied = run.applied | loaded.applied | trainer.applied
            acts = {name: f"{act.count} {act.detail}" for name, act in applied.items()}
            summary = _summary(run, progress, meter) | {"measured_peak_bytes": measured, "applied": acts}
    finally:
        for observer in trainer.observers:
            observer.end(summary)
    if ranks.is_main:
        folder.summary.write_text(json.dumps(summary, indent=2))
        completion.show()
        _show(summary, folder)
    ranks.barrier()


def _tokens(folder: RunFolder) -> TokenStore:
    path = Path(folder.read_identity()["tokens"])
    store = open_store(path)
    if store is None:
        raise DataError(f"the tokenised corpus {path} is gone or damaged", "resume=never tokenises anew and starts another run")
    return store


def compute_dtype(decisions: tuple[Decision, ...], device: Device) -> tuple[torch.dtype, dict[str, Applied]]:
    """Dtype of matrix products and frozen weights, and which optimization decided it."""
    runtime = Runtime(device.supports_bf16)
    applied = apply_stage(Stage.runtime, decisions, runtime)
    return getattr(torch, runtime.compute_dtype), applied


def prepare_process(config: RunConfig, ranks: Ranks, device: Device) -> None:
    """Determinism, the memory cap and the kernels of an emulated card, the seed."""
    if config.training.deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    if config.hardware.cap is not Cap.none and ranks.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(device.memory_usable_bytes / torch.cuda.get_device_properties(ranks.device).total_memory)
    if config.hardware.cap is Cap.emulate and device.compute_capability is not None and device.compute_capability < (8, 0):
        # What is left to torch's own attention is the memory-efficient kernel.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(config.seed)


def _assemble(run: _Run, loaded: LoadedModel, store: TokenStore, meter: Meter) -> Trainer:
    config, tier, ranks, steps = run.config, run.config.tier, run.ranks, run.plan["steps"]
    executors = build(loaded, run.layout, run.dtype, run.device, ranks, Path(config.output.cache).expanduser())
    optimizer, applied = build_optimizer(loaded.trainable, config.training, run.decisions)
    with_context, alone = (
        validation_batches(store, tier.context, tier.target_length, config.data.val_sequences, config.seed, with_context=flag)
        for flag in (True, False)
    )
    return Trainer(
        config=config.training,
        steps=steps,
        accumulation=run.plan["accumulation"],
        loaded=loaded,
        executor=executors.training,
        optimizer=optimizer,
        scheduler=schedule(optimizer, config.schedule, steps),
        scaler=make_scaler(ranks.device, run.dtype),
        stream=TrainStream(store, config.data, tier.context, config.training.micro_batch, config.seed, run.packed, ranks.rank, ranks.world),
        validator=Validator(executors.validation, with_context, alone, ranks),
        meter=meter,
        ranks=ranks,
        checkpoints=run.folder.checkpoints,
        applied=applied,
    )


def _observers(run: _Run, step: int) -> list[Observer]:
    settings = {"config": asdict(run.config), "plan": run.plan}
    folder, name = run.folder, run.config.name or run.folder.path.name
    tracker = start_tracker(run.config.logger, folder.path, name, folder.read_identity()["tracker_id"], settings, console)
    trackers = [tracker] if tracker else []
    return [metrics_file.MetricsFile(folder.metrics, step), *trackers, Screen(console, run.plan["steps"], step)]


class _Completion:
    """A held-out file completed before and after training, kept in `completion.json`."""

    def __init__(self, run: _Run, loaded: LoadedModel, store: TokenStore) -> None:
        config, tokens = run.config, run.config.training.completion_tokens
        self._loaded, self._dtype, self._device = loaded, run.dtype, run.ranks.device
        self._file = run.folder.path / "completion.json"
        wanted = run.ranks.is_main and tokens > 0
        # Generation keeps keys and values of all layers, which training need not have room for.
        self._example = completion_example(store, run.plan["generation_tokens"], tokens, config.seed) if wanted else None
        cache = Path(config.output.cache).expanduser()
        self._tokenizer: Any = pretrained.tokenizer(config.model, cache, download=False) if wanted else None

    def write(self, when: str) -> None:
        """Complete now and record it as `before` or `after`."""
        if self._example is None:
            return
        example, decode = self._example, self._tokenizer.decode
        text = complete(self._loaded, self._tokenizer, example, self._dtype, self._device)
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        known |= {"path": example.path, "prompt_end": decode(example.prompt[-64:]), "reference": decode(example.reference), when: text}
        self._file.write_text(json.dumps(known, indent=2))

    def show(self) -> None:
        """Print prompt, reference and both completions."""
        if self._example is None:
            return
        known = json.loads(self._file.read_text())
        console.print(f"\n[bold]Completion of held-out[/] {known['path']}")
        for title in ("prompt_end", "reference", "before", "after"):
            if title in known:
                console.print(f"[dim]── {title.replace('_', ' ')}[/]")
                console.print(known[title], markup=False)


def _summary(run: _Run, progress: Progress, meter: Meter) -> dict[str, Any]:
    steps = [line for line in metrics_file.read(run.folder.metrics) if "loss" in line]
    # The first step allocates and compiles; it says nothing about the others.
    timed = steps[1:] or steps
    return {
        "name": run.config.name or run.folder.path.name,
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_loss_first": progress.first_loss,
        "train_loss_last": progress.last_loss,
        "val_first": progress.first_val,
        "val_last": progress.last_val,
        "best_val_loss": progress.best_val_loss,
        "best_step": progress.best_step,
        "predicted_peak_bytes": run.plan["total_bytes"],
        "reserved_peak_bytes": meter.highest["gpu_reserved_bytes"],
        "host_rss_peak_bytes": meter.highest["host_rss_bytes"],
        "predicted_step_s": run.plan["step_s"],
        "step_s": statistics.median(line["step_time_s"] for line in timed),
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in timed),
        "train_time_s": sum(line["step_time_s"] for line in steps),
    }


def _show(summary: dict[str, Any], folder: RunFolder) -> None:
    first, last = summary["val_first"], summary["val_last"]
    worth = [losses["val_loss_alone"] - losses["val_loss"] for losses in (first, last)]
    console.print(
        f"\n{summary['steps']} steps, {summary['tokens']:,} tokens, {summary['tokens_per_s']:,.0f} tokens/s\n"
        f"validation loss  {first['val_loss']:.4f} → {last['val_loss']:.4f}   alone {first['val_loss_alone']:.4f} → "
        f"{last['val_loss_alone']:.4f}   context is worth {worth[0]:+.4f} → {worth[1]:+.4f}\n"
        f"peak memory  {gib(summary['measured_peak_bytes'])} measured, {gib(summary['predicted_peak_bytes'])} planned\n"
        f"results in {folder.path}",
    )


def main() -> None:
    """The process's edge: an error is shown here, and its exit code tells the parent so."""
    start_logging()
    try:
        with joined() as ranks:
            train(RunFolder(Path(sys.argv[1])), ranks)
    except EliteError as error:
        show(error)
        sys.exit(error.exit_code)
    except Interrupted:
        sys.exit(130)
