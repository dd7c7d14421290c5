"""One training process: assemble what the run folder describes, train, leave the results there.

Started as `python -m elite.worker FOLDER` by the launcher, or called in process under torchrun.
"""

import json
import os
import statistics
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

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
from elite.executor.whole import WholeExecutor
from elite.model import LoadedModel, apply_stage, load, save_trained
from elite.optimizations import decide
from elite.optimizations.contract import Decision, Stage
from elite.optimizations.targets import BatchLayout, Runtime
from elite.plan import facts_of, model_flops_per_token
from elite.plan.words import gib
from elite.runfolder import RunFolder
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


def _train(folder: RunFolder, ranks: Ranks) -> None:
    config, plan = from_yaml(folder.config), json.loads(folder.plan.read_text())
    device = hardware.device(config.hardware)
    facts = facts_of(config, device, geometry.shape(config.model))
    decisions = decide(config.optimizations, facts)
    _prepare_process(config, ranks, device.memory_usable_bytes)
    runtime, layout = Runtime(device.supports_bf16), BatchLayout()
    applied = apply_stage(Stage.data, decisions, layout) | apply_stage(Stage.runtime, decisions, runtime)
    dtype = getattr(torch, runtime.compute_dtype)

    meter = Meter(ranks, model_flops_per_token(facts), device.matmul_flops_per_s)
    loaded = load(config, decisions, dtype, ranks.device)
    torch.manual_seed(config.seed + ranks.rank)
    store = _tokens(folder)
    trainer = _assemble(config, plan, loaded, decisions, dtype, layout, store, meter, ranks, folder)
    last = checkpoint.require_latest(folder.checkpoints) if folder.begun else None
    if last is not None:
        trainer.resume(last)
    applied |= loaded.applied | trainer.applied
    completion = _Completion(config, loaded, store, dtype, ranks, folder)
    if last is None:
        completion.write("before")
    trainer.observers = _observers(config, plan, folder, trainer.progress.step, trainer.steps) if ranks.is_main else []
    summary: dict[str, Any] = {}
    try:
        progress = trainer.fit()
        completion.write("after")
        if ranks.is_main:
            save_trained(loaded, folder.final)
            summary = _summary(config, plan, folder, progress, meter)
            summary["applied"] = {name: f"{act.count} {act.detail}" for name, act in applied.items()}
        else:
            meter.measured_peak_bytes()
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


def _prepare_process(config: RunConfig, ranks: Ranks, usable_bytes: int) -> None:
    if config.training.deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    if config.hardware.cap is Cap.memory and ranks.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(usable_bytes / torch.cuda.get_device_properties(ranks.device).total_memory)
    torch.manual_seed(config.seed)


def _assemble(
    config: RunConfig,
    plan: dict[str, Any],
    loaded: LoadedModel,
    decisions: tuple[Decision, ...],
    dtype: torch.dtype,
    layout: BatchLayout,
    store: TokenStore,
    meter: Meter,
    ranks: Ranks,
    folder: RunFolder,
) -> Trainer:
    optimizer, applied = build_optimizer(loaded.trainable, config.training, decisions)
    model = DistributedDataParallel(loaded.model, broadcast_buffers=False) if ranks.world > 1 else loaded.model
    tier = config.tier
    with_context, alone = (
        validation_batches(store, tier.context, tier.target_length, config.data.val_sequences, config.seed, with_context=flag)
        for flag in (True, False)
    )
    return Trainer(
        config=config.training,
        steps=plan["steps"],
        accumulation=plan["accumulation"],
        loaded=loaded,
        executor=WholeExecutor(model, dtype),
        optimizer=optimizer,
        scheduler=schedule(optimizer, config.schedule, plan["steps"]),
        scaler=make_scaler(ranks.device, dtype),
        stream=TrainStream(
            store, config.data, tier.context, config.training.micro_batch, config.seed, layout.packed, ranks.rank, ranks.world
        ),
        # Validation runs on the bare model: DDP would wait for ranks that have fewer targets.
        validator=Validator(WholeExecutor(loaded.model, dtype), with_context, alone, ranks),
        meter=meter,
        ranks=ranks,
        checkpoints=folder.checkpoints,
        applied=applied,
    )


def _observers(config: RunConfig, plan: dict[str, Any], folder: RunFolder, step: int, steps: int) -> list[Observer]:
    settings = {"config": asdict(config), "plan": plan}
    name = config.name or folder.path.name
    tracker = start_tracker(config.logger, folder.path, name, folder.read_identity()["tracker_id"], settings, console)
    trackers = [tracker] if tracker else []
    return [metrics_file.MetricsFile(folder.metrics, step), *trackers, Screen(console, steps, step)]


class _Completion:
    """A held-out file completed before and after training, kept in `completion.json`."""

    def __init__(
        self, config: RunConfig, loaded: LoadedModel, store: TokenStore, dtype: torch.dtype, ranks: Ranks, folder: RunFolder
    ) -> None:
        self._loaded, self._dtype, self._device = loaded, dtype, ranks.device
        self._file = folder.path / "completion.json"
        tokens = config.training.completion_tokens
        wanted = ranks.is_main and tokens > 0
        self._example = completion_example(store, config.tier.context, tokens, config.seed) if wanted else None
        self._tokenizer: Any = (
            pretrained.tokenizer(config.model, Path(config.output.cache).expanduser(), download=False) if wanted else None
        )

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


def _summary(config: RunConfig, plan: dict[str, Any], folder: RunFolder, progress: Progress, meter: Meter) -> dict[str, Any]:
    steps = [line for line in metrics_file.read(folder.metrics) if "loss" in line]
    # The first step allocates and compiles; it says nothing about the others.
    timed = steps[1:] or steps
    return {
        "name": config.name or folder.path.name,
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_loss_first": progress.first_loss,
        "train_loss_last": progress.last_loss,
        "val_first": progress.first_val,
        "val_last": progress.last_val,
        "best_val_loss": progress.best_val_loss,
        "best_step": progress.best_step,
        "predicted_peak_bytes": plan["total_bytes"],
        "measured_peak_bytes": meter.measured_peak_bytes(),
        "reserved_peak_bytes": meter.highest["gpu_reserved_bytes"],
        "host_rss_peak_bytes": meter.highest["host_rss_bytes"],
        "predicted_step_s": plan["step_s"],
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
    """The process's edge: errors are shown once, by the lowest rank that has one."""
    start_logging()
    try:
        with joined() as ranks:
            train(RunFolder(Path(sys.argv[1])), ranks)
    except EliteError as error:
        show(error)
        sys.exit(error.exit_code)
    except Interrupted:
        sys.exit(130)


if __name__ == "__main__":
    main()
