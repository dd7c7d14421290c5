"""`mode=lr_range`: which learning rate this run could have, found by training at rising rates on its own data and model.

It has a folder of its own with `lr_range.json` and `lr_range.svg`, and leaves nothing that a run would continue from or read.
"""

import json
from itertools import count
from pathlib import Path
from typing import Any

import torch

from elite import rehearsal
from elite.console import console
from elite.data.batches import TrainStream
from elite.data.tokens import TokenStore
from elite.distributed.ranks import joined
from elite.executor.build import build, streams_weights
from elite.executor.contract import Executor
from elite.model import load
from elite.prepared import Run, prepared
from elite.report.lr_range_plot import drawn
from elite.runfolder import RunFolder, environment
from elite.training.ahead import Taking
from elite.training.around import hooked_step, loop_hooks
from elite.training.heap import settled
from elite.training.lr_range import Sweep, sweep
from elite.training.optimizer import build_optimizer
from elite.training.shortage import actual, is_out_of_memory
from elite.training.step import make_scaler


def lr_range(folder: RunFolder, store: TokenStore) -> dict[str, Any]:
    """Test the run that the folder describes; returns what `lr_range.json` gets.

    Raises:
        MemoryShortage: a step does not fit.
    """
    with joined() as ranks:
        run = prepared(folder, ranks)
        try:
            run, found = _swept(run, store if run.mapped else store.resident())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise rehearsal.shortage(run, actual(str(error), None, None, ranks.device), 0) from error
    result = _result(run, found)
    file = folder.path / "lr_range.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    if found.losses:
        said = f"{run.plan['model']}, {run.plan['adapter']}, {result['step_tokens']:,} tokens a step; ended by {found.stopped}"
        (folder.path / "lr_range.svg").write_text(drawn(found, said))
    _show(result, folder)
    return result


def _swept(run: Run, store: TokenStore) -> tuple[Run, Sweep]:
    config, ranks = run.config, run.ranks
    loaded = load(config, run.decisions, run.dtype, ranks.device, streams_weights(run.layout))
    run = rehearsal.micro_batch_found(run, loaded)
    config = run.config
    torch.manual_seed(config.seed)
    executors = build(loaded, run.layout, run.dtype, run.device, ranks, Path(config.output.cache).expanduser())
    optimizer, _ = build_optimizer(loaded.trainable, run.plan["learning_rate"], config.training, run.decisions, loaded.model)
    untrained = _untrained(run, executors.validation, _stream(run, store))
    stream = _stream(run, store)
    scaler, norm = make_scaler(ranks.device, run.dtype), config.training.max_grad_norm
    # Groups keep the proportions that their rates have.
    own = [group["lr"] / run.plan["learning_rate"] for group in optimizer.param_groups]

    hooks, _ = loop_hooks(
        *(config, run.decisions, executors.training, optimizer, loaded.trainable, config.lr_range.steps, ranks.device),
        taking=Taking.of(*(run.plan[name] for name in ("ahead_bytes", "memory"))),
        rehearse=lambda: rehearsal.warm(run, loaded, executors),
    )
    for hook in hooks:
        hook.begin()
    numbers = count(1)

    def step(rate: float) -> float:
        for group, share in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = share * rate
        window = stream.next_window(_accumulation(run))
        around = (next(numbers), hooks, executors.training, optimizer)
        return hooked_step(*around, scaler, window, loaded.trainable, norm, ranks).loss

    try:
        with settled():
            return run, sweep(step, untrained, config.lr_range)
    finally:
        if executors.attached is not None:
            executors.attached.undo()


def _stream(run: Run, store: TokenStore) -> TrainStream:
    config = run.config
    return TrainStream(store, config.data, config.tier.context, config.training.sequences, config.seed, run.packed)


@torch.no_grad()
def _untrained(run: Run, executor: Executor, stream: TrainStream) -> list[float]:
    """The loss of every step's window before the first step, nats a token."""
    device, losses = run.ranks.device, []
    executor.model.eval()
    for _ in range(run.config.lr_range.steps):
        window = stream.next_window(_accumulation(run))
        total = sum(executor.loss_sum(batch.to(device)).item() for batch in window)
        losses.append(total / sum(batch.label_tokens for batch in window))
    executor.model.train()
    return losses


def _accumulation(run: Run) -> int:
    wanted = run.config.lr_range.accumulation
    accumulation: int = run.plan["accumulation"] if wanted is None else wanted
    return accumulation


def _result(run: Run, found: Sweep) -> dict[str, Any]:
    plan, training = run.plan, run.config.training
    # What has to be typed for it: the plan scales it by the tokens of a step.
    typed = None if found.valley is None else found.valley * training.learning_rate / plan["learning_rate"]
    return {
        "environment": environment(),
        "model": plan["model"],
        "adapter": plan["adapter"],
        "context": plan["context"],
        "step_tokens": plan["context"] * plan["micro_batch"] * _accumulation(run),
        "lowest": run.config.lr_range.lowest,
        "highest": run.config.lr_range.highest,
        "suggested_learning_rate": typed,
        **found.to_dict(),
    }


def _show(result: dict[str, Any], folder: RunFolder) -> None:
    console.print(f"{len(result['rates'])} rates from {result['lowest']:g}; ended by {result['stopped']}", markup=False)
    if result["suggested_learning_rate"] is None:
        console.print("the loss never fell: a lower lr_range.lowest, or more lr_range.steps")
    else:
        console.print(
            f"steepest descent at {result['steepest']:.2g}, middle of the valley at {result['valley']:.2g}\n"
            f"suggested: training.learning_rate={result['suggested_learning_rate']:.2g}"
        )
    console.print(f"results in {folder.path}", markup=False)
