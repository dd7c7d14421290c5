"""What a run's curriculum needs to know of its data and its model before the first step."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from elite.config import RunConfig
from elite.console import console
from elite.curriculum import Curriculum, Measure
from elite.data.batches import collate
from elite.data.course import Course, Ramp
from elite.data.difficulty import by_files, document_lengths
from elite.data.tokens import TokenFile, TokenStore
from elite.distributed.gradients import gradient_exchange
from elite.distributed.ranks import Ranks
from elite.distributed.watchdog import Beat, no_beat
from elite.errors import CheckpointError
from elite.executor.contract import Executor
from elite.jsonfile import read_json
from elite.plan.stages import context_stages
from elite.plan.words import duration


def course_of(
    config: RunConfig,
    plan: dict[str, Any],
    store: TokenStore,
    executor: Executor,
    ranks: Ranks,
    scores: Path,
    beat: Beat = no_beat,
    carriers: Ranks | None = None,
) -> Course:
    """Where the curriculum leads.

    Args:
        plan: as in `plan.json`.
        executor: around the bare model, untrained as yet.
        scores: the losses of the untrained model, by training file; read if they are there, else found and written.
        beat: told before each file that is scored.
        carriers: those that share the work of scoring; unset: all.

    Raises:
        DataError: there is no order from easy to hard.
    """
    steps: int = plan["steps"]
    course = Course(plan["step_tokens"] // config.tier.context, context_stages(config, steps))
    if config.curriculum.name is not Curriculum.difficulty:
        return course
    if config.curriculum.measure is Measure.length:
        values = document_lengths(store, config.data.unit)
    else:
        values = _scores(store, config.tier.context, executor, ranks, scores, beat, carriers or ranks)
    chosen = config.curriculum
    ramp = Ramp(by_files(store, values), chosen.start_fraction, chosen.pacing, chosen.full_at * steps)
    return Course(course.step_sequences, course.stages, ramp)


def _scores(store: TokenStore, context: int, executor: Executor, ranks: Ranks, file: Path, beat: Beat, carriers: Ranks) -> list[float]:
    anew = f"delete it: {file.name} is measured anew"
    known: list[float] | None = read_json(file, CheckpointError, anew) if ranks.is_main and file.is_file() else None
    known = ranks.broadcast(known)
    if known is not None:
        if not isinstance(known, list) or len(known) != len(store.select("train")):
            raise CheckpointError(f"{file} is damaged, or of another corpus", anew)
        return known
    began = time.perf_counter()
    found = file_losses(store, store.select("train"), context, executor, carriers, beat)
    if ranks.is_main:
        written = file.with_suffix(".partial")
        written.write_text(json.dumps(found))
        written.rename(file)
        console.print(f"difficulty: {len(found):,} files scored by the untrained model in {duration(time.perf_counter() - began)}")
    return found


@torch.no_grad()
def file_losses(
    store: TokenStore, files: Sequence[TokenFile], context: int, executor: Executor, ranks: Ranks, beat: Beat = no_beat
) -> list[float]:
    """Mean loss a token of each file alone, up to the first `context` tokens of it; nats. The ranks share the work."""
    model, training = executor.model, executor.model.training
    model.eval()
    mine = []
    for file, _ in gradient_exchange(model).dealt(files, ranks):
        beat("scoring a file")
        count = min(file.length, context)
        batch = collate(store, [(((file.start, count),),)], count, store.end_token)
        mine.append(executor.loss_sum(batch.to(ranks.device)).item() / max(1, batch.label_tokens))
    model.train(training)
    parts = ranks.gather(mine)
    return [parts[index % ranks.world][index // ranks.world] for index in range(len(files))]
