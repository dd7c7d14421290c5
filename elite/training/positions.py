"""Validation loss by position: what a token costs when so many stand before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from elite.data.batches import IGNORE, Batch
from elite.distributed.ranks import Ranks
from elite.executor.contract import Executor

FIRST = 128
"""The first bucket has no more positions than this."""


@dataclass(frozen=True)
class Bucket:
    """Positions `first` to `end - 1` of a document."""

    first: int
    end: int
    tokens: int
    """Scored there."""
    loss: float | None
    """Their mean, nats a token; None where no text reaches."""


def edges(context: int) -> list[int]:
    """Borders of the buckets, each twice the one before it, up to `context`."""
    found = [context]
    while found[-1] > FIRST:
        found.append(found[-1] // 2)
    return [0, *found[::-1]]


@torch.no_grad()
def by_position(executor: Executor, batches: Sequence[Batch], context: int, ranks: Ranks) -> list[Bucket]:
    """Mean loss in each bucket.

    A bucket is scored by passes over what stands up to its end, which together cost less than two passes over everything.

    Args:
        batches: one row each, one document, labels wherever it is to be scored.
    """
    model = executor.model
    training = model.training
    model.eval()
    found = []
    for first, end in pairwise(edges(context)):
        total, tokens = 0.0, 0
        for batch in batches[ranks.rank :: ranks.world]:
            part = _within(batch, first, end)
            scored = (part.labels != IGNORE).any(0).nonzero()[:, 0].to(ranks.device)
            if len(scored):
                total += executor.loss_sum(part.to(ranks.device), keep=scored).item()
                tokens += len(scored)
        everywhere = int(ranks.sum(float(tokens)))
        total = ranks.sum(total)
        found.append(Bucket(first, end, everywhere, total / everywhere if everywhere else None))
    model.train(training)
    return found


def _within(batch: Batch, first: int, end: int) -> Batch:
    """The row up to position `end`, scored from `first` on."""
    labels = batch.labels[:, :end].clone()
    labels[:, :first] = IGNORE
    return Batch(batch.input_ids[:, :end], labels, batch.position_ids[:, :end], ((labels.shape[1],),))
