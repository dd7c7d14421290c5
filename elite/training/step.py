"""One optimizer step: a window of micro-batches, normalised by the tokens of the whole global batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elite.data.batches import Batch
from elite.distributed.gradients import gradient_exchange
from elite.distributed.ranks import Ranks
from elite.distributed.watchdog import Beat, no_beat
from elite.errors import EliteError
from elite.executor.contract import Executor
from elite.stability import Verdict


class DivergedError(EliteError):
    """The numbers of a step are bad, and there is no way on."""


LEAST_SCALE = 1.0
"""fp16 gradients that overflow without being scaled up overflow by themselves."""
Judge = Callable[[float, float, bool], Verdict]
"""Given a step's loss, its gradient norm and whether they are fit for an update, what becomes of the step; may raise `DivergedError`."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Mean over all label tokens of the global batch, in nats."""
    grad_norm: float
    """L2 norm before clipping."""
    tokens: int
    """Token slots processed by all ranks, padding included."""
    verdict: Verdict = Verdict.take
    """Of `take` alone there was an update."""


@dataclass
class Pending:
    """A window whose gradients are there but for those of its last micro-batch."""

    last: torch.Tensor
    """Loss of the last micro-batch, its share of the mean, with its graph."""
    others: torch.Tensor
    """Loss of those before it."""


def begin(executor: Executor, window: Sequence[Batch], scaler: torch.amp.GradScaler, ranks: Ranks, beat: Beat = no_beat) -> Pending:
    """All passes of a window but the last backward, after which gradients are whole. Unless the exchange is in every pass, no rank waits
    for another until then.

    Dividing every micro-batch by the label tokens of the *whole* global batch makes the result independent of how
    sequences of unequal length are dealt to micro-batches and ranks.

    Args:
        beat: told before each micro-batch.
    """
    device, exchange = ranks.device, gradient_exchange(executor.model)
    labels = ranks.sum(float(sum(batch.label_tokens for batch in window)))
    others = torch.zeros((), device=device)
    with exchange.adding():
        for batch in window[:-1]:
            beat("a micro-batch")
            loss = executor.loss_sum(batch.to(device)) / labels
            # Gradients are averaged over ranks, hence `world`.
            exchange.backward(scaler.scale(loss * ranks.world))
            others += loss.detach()
            del loss
        beat("a step's last micro-batch")
        return Pending(executor.loss_sum(window[-1].to(device)) / labels, others)


def finish(pending: Pending, executor: Executor, scaler: torch.amp.GradScaler, ranks: Ranks) -> float:
    """The last backward; the mean token loss over the global batch."""
    with ranks.meeting("the exchange of gradients"):
        gradient_exchange(executor.model).last_backward(scaler.scale(pending.last * ranks.world))
    return ranks.sum(pending.others + pending.last.detach())


def accumulate(executor: Executor, window: Sequence[Batch], scaler: torch.amp.GradScaler, ranks: Ranks) -> float:
    """Add the gradient of the mean token loss over the global batch to the parameters; return that mean."""
    return finish(begin(executor, window, scaler, ranks), executor, scaler, ranks)


Accumulate = Callable[[Executor, Sequence[Batch], torch.amp.GradScaler, Ranks], float]


def optimizer_step(
    executor: Executor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    window: Sequence[Batch],
    parameters: Sequence[nn.Parameter],
    max_grad_norm: float,
    ranks: Ranks,
    before_clipping: Callable[[], None] | None = None,
    judge: Judge | None = None,
    gradients: Accumulate = accumulate,
) -> StepResult:
    """Forward, backward, clip, update.

    Args:
        before_clipping: may change the gradients, which are whole and unscaled then.
        judge: decides whether there is an update; unset: always, with finite numbers.
        gradients: adds them up; a run's does it again in smaller passes where memory runs out (elite/training/recovery.py).

    Raises:
        DivergedError: the judge says so; without one, loss or gradient is not finite. Nothing has been updated then.
    """
    loss = gradients(executor, window, scaler, ranks)
    exchange = gradient_exchange(executor.model)
    exchange.unscale(optimizer, scaler)
    if before_clipping is not None:
        before_clipping()
    norm = exchange.clipped(parameters, max_grad_norm)
    verdict = (judge or _finite_or_stop)(loss, norm, math.isfinite(loss) and (math.isfinite(norm) or _overflowed(scaler)))
    (exchange.update if verdict is Verdict.take else exchange.drop)(optimizer, scaler)
    tokens = sum(batch.slots for batch in window) * ranks.world // window[0].ranks
    return StepResult(loss, norm, tokens, verdict)


def _overflowed(scaler: torch.amp.GradScaler) -> bool:
    """Whether a gradient that is not finite, of a loss that is, is fp16's overflow: the scaler then skips the update itself and lowers
    its scale. Where nothing is left to lower it is the gradient itself."""
    return scaler.is_enabled() and scaler.get_scale() >= LEAST_SCALE


def _finite_or_stop(loss: float, norm: float, fit: bool) -> Verdict:
    if not fit:
        raise DivergedError(f"loss {loss}, gradient norm {norm}: not finite", "lower training.learning_rate; the last checkpoint is intact")
    return Verdict.take


def make_scaler(device: torch.device, compute_dtype: torch.dtype) -> Any:
    """Loss scaling for fp16, whose gradients would vanish without; a pass-through otherwise."""
    return torch.amp.GradScaler(device.type, enabled=compute_dtype == torch.float16)
