"""A real trainer of a tiny model on a corpus of a few hundred tokens, assembled as a run is."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from elite.attention import DOCUMENT_EAGER
from elite.config import DataConfig, Schedule, ScheduleConfig, TrainingConfig
from elite.data.batches import TrainStream
from elite.data.tokens import TokenFile, TokenStore
from elite.data.validation import validation_batches
from elite.distributed.gradients import gradient_exchange
from elite.distributed.ranks import Ranks
from elite.distributed.zero import Sharded, divide
from elite.executor.whole import WholeExecutor
from elite.model import LoadedModel, apply_stage
from elite.optimizations.contract import Decision, Stage
from elite.optimizations.fused_loss import FusedLoss
from elite.optimizations.targets import LoopBuild
from elite.training.loop import Trainer
from elite.training.optimizer import build_optimizer
from elite.training.schedules import schedule
from elite.training.step import make_scaler
from elite.training.telemetry import Meter
from elite.training.trial import Subject, rehearse
from elite.training.validation import Validator
from tests.models import tiny

ALONE = Ranks(0, 1, torch.device("cpu"))
CONTEXT, VOCAB, SEED = 40, 97, 3
TRAINING = TrainingConfig(learning_rate=1e-2, val_every=2, checkpoint_every=1000, max_grad_norm=1e3)
CONSTANT = ScheduleConfig(name=Schedule.constant, warmup_fraction=0.0)


def corpus(folder: Path) -> TokenStore:
    """Eight training files of one sequence each, four held-out ones."""
    tokens = np.random.default_rng(0).integers(1, VOCAB, 12 * CONTEXT).astype(np.uint16)
    files = [TokenFile("repo", f"{i:02}.py", i * CONTEXT, CONTEXT, "train" if i < 8 else "val") for i in range(12)]
    return TokenStore(folder, tokens, tuple(files), 0, ())


def adapted(kind: str, dropout: float = 0.0, rank: int = 4) -> LoadedModel:
    core = tiny(kind, DOCUMENT_EAGER, hidden_size=64)
    core.requires_grad_(False)
    options = LoraConfig(r=rank, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    return LoadedModel(get_peft_model(core, options).train(), core, {})


def whole_model(kind: str) -> LoadedModel:
    """All of it is trained."""
    core = tiny(kind, DOCUMENT_EAGER, hidden_size=64)
    return LoadedModel(core, core, {})


def loop_build(
    loaded: LoadedModel, optimizer: Any, steps: int, validations: int, ranks: Ranks = ALONE, settings: dict[str, Any] | None = None
) -> LoopBuild:
    """What a loop is made of.

    Args:
        settings: of DeepSpeed, which divides gradients then.
    """
    model: Any = loaded.model
    if settings is not None:
        divide(loaded, settings, ranks)
        model = Sharded(loaded, optimizer, settings, ranks)
    elif ranks.world > 1:
        # Small enough that gradients are exchanged in several parts.
        model = DistributedDataParallel(loaded.model, broadcast_buffers=False, bucket_cap_mb=0.01, gradient_as_bucket_view=True)
    executor = WholeExecutor(model, torch.float32, FusedLoss.name in loaded.applied)
    subject = Subject(executor, torch.float32, loaded.trainable, VOCAB, CONTEXT, ALONE.device, 1e9, 0.0)
    return LoopBuild(
        executor=executor,
        optimizer=optimizer,
        parameters=loaded.trainable,
        steps=steps,
        validations=validations,
        seed=SEED,
        device=ALONE.device,
        rehearse=lambda: rehearse(subject, 1),
    )


def rig(
    folder: Path,
    decisions: Sequence[Decision] = (),
    steps: int = 6,
    kind: str = "llama",
    training: TrainingConfig = TRAINING,
    plan: ScheduleConfig = CONSTANT,
    dropout: float = 0.0,
    rank: int = 4,
    ranks: Ranks = ALONE,
    accumulation: int = 2,
    loaded: LoadedModel | None = None,
    settings: dict[str, Any] | None = None,
) -> Trainer:
    """A trainer of so many steps, two micro-batches each, that saves under `folder`.

    Args:
        loaded: unset: one with adapters.
        settings: as in `loop_build`.
    """
    chosen = tuple(decision for decision in decisions if decision.active)
    torch.manual_seed(SEED)
    loaded, store = loaded or adapted(kind, dropout, rank), corpus(folder)
    optimizer, applied = build_optimizer(loaded.trainable, training.learning_rate, training, chosen, loaded.model)
    scheduler = schedule(optimizer, plan, steps)
    around = loop_build(loaded, optimizer, steps, len({*range(training.val_every, steps, training.val_every), steps}), ranks, settings)
    applied |= apply_stage(Stage.loop, chosen, around)
    # As elite/executor/build.py does.
    validated = around.executor.model if gradient_exchange(around.executor.model).divides_weights else loaded.model
    fused = FusedLoss.name in loaded.applied
    with_context, alone = (validation_batches(store, CONTEXT, 10, 4, SEED, with_context=flag) for flag in (True, False))
    return Trainer(
        config=training,
        steps=steps,
        accumulation=accumulation,
        loaded=loaded,
        executor=around.executor,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=make_scaler(ALONE.device, torch.float32),
        stream=TrainStream(store, DataConfig(), CONTEXT, 1, SEED, packed=False, rank=ranks.rank, world=ranks.world),
        validator=Validator(WholeExecutor(validated, torch.float32, fused), with_context, alone, ranks),
        meter=Meter(ranks, lambda context: 1.0, 0.0),
        ranks=ranks,
        checkpoints=folder / "checkpoints",
        applied=applied,
        hooks=around.hooks,
    )


class Record:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.validations: list[dict[str, float]] = []

    def step(self, record: dict[str, float]) -> None:
        self.steps.append(record)

    def validation(self, record: dict[str, float]) -> None:
        self.validations.append(record)

    def end(self, summary: dict[str, Any]) -> None:
        """Nothing is open."""


def fitted(trainer: Trainer) -> Record:
    """Train to the end; what was seen on the way."""
    record = Record()
    trainer.observers = (record,)
    trainer.fit()
    return record


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.loaded.trainable]


def every(training: TrainingConfig, val_every: int) -> TrainingConfig:
    return replace(training, val_every=val_every)
