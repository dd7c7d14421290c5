"""The gradient of a global batch does not depend on how it is dealt."""

import gc
import threading
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from elite.data.batches import IGNORE, Batch
from elite.distributed.gradients import in_this_thread
from elite.distributed.ranks import Ranks
from elite.executor.whole import WholeExecutor
from elite.training.step import DivergedError, StepResult, accumulate, make_scaler, optimizer_step
from tests.models import tiny
from tests.training.failing import Fails

ALONE = Ranks(0, 1, torch.device("cpu"))
LENGTHS = (40, 3, 17, 29, 8, 33, 12, 25)
CONTEXT = 40


def rows() -> list[Batch]:
    """Eight rows padded to one length, each with another number of labels."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for length in LENGTHS:
        ids = torch.randint(0, 97, (1, CONTEXT), generator=generator)
        labels = ids.roll(-1, 1)
        labels[0, length - 1 :] = IGNORE
        padding = CONTEXT - length
        positions = torch.cat([torch.arange(length), torch.arange(padding)])[None]
        batches.append(Batch(ids, labels, positions, ((length, padding) if padding else (length,),)))
    return batches


def stacked(batches: list[Batch]) -> Batch:
    return Batch(
        torch.cat([b.input_ids for b in batches]),
        torch.cat([b.labels for b in batches]),
        torch.cat([b.position_ids for b in batches]),
        tuple(document for b in batches for document in b.documents),
    )


def norm_and_loss(window: list[Batch]) -> tuple[float, float]:
    model = tiny("llama")
    executor = WholeExecutor(model, torch.float32)
    loss = accumulate(executor, window, make_scaler(ALONE.device, torch.float32), ALONE)
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)), loss


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 7), (3, 3, 2)])
def test_any_split_of_the_global_batch_gives_one_gradient_norm(sizes: tuple[int, ...]) -> None:
    expected_norm, expected_loss = norm_and_loss(rows())
    batches, window = rows(), []
    for size in sizes:
        window.append(stacked(batches[:size]))
        batches = batches[size:]
    norm, loss = norm_and_loss(window)
    assert norm == pytest.approx(expected_norm, rel=1e-5)
    assert loss == pytest.approx(expected_loss, rel=1e-5)


def test_the_loss_is_the_mean_over_all_labels() -> None:
    model = tiny("llama")
    batch = stacked(rows())
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, documents=batch.documents, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
    assert norm_and_loss(rows())[1] == pytest.approx(expected.item(), rel=1e-5)


def step_of(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> StepResult:
    executor, scaler = WholeExecutor(model, torch.float32), make_scaler(ALONE.device, torch.float32)
    return optimizer_step(executor, optimizer, scaler, rows(), list(model.parameters()), 1.0, ALONE)


def test_a_step_moves_the_weights_and_clears_gradients() -> None:
    model = tiny("llama")
    before = model.lm_head.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    result = step_of(model, optimizer)
    assert not torch.equal(model.lm_head.weight, before)
    assert all(p.grad is None for p in model.parameters())
    assert result.tokens == len(LENGTHS) * CONTEXT


def test_nothing_is_updated_when_the_loss_is_not_finite() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    before = model.model.embed_tokens.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with pytest.raises(DivergedError, match="not finite"):
        step_of(model, optimizer)
    assert torch.equal(model.model.embed_tokens.weight, before)


class _Observed(torch.autograd.Function):
    """The identity; `seen` gets the thread that asks for its gradient, and whether the engine may use others."""

    seen: ClassVar[list[tuple[int, bool]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        _Observed.seen.append((threading.get_ident(), torch._C._is_multithreading_enabled()))
        return upstream[0]


class _Observing:
    """An executor whose loss is that of one number."""

    def __init__(self, device: torch.device) -> None:
        self.model: torch.nn.Module = torch.nn.Linear(1, 1, device=device)

    def loss_sum(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        loss: Tensor = _Observed.apply(next(self.model.parameters())).sum()
        return loss


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_backward_runs_in_the_thread_that_asks_for_it(kind: str) -> None:
    alone = Ranks(0, 1, torch.device(kind))
    _Observed.seen.clear()
    executor = _Observing(alone.device)
    accumulate(executor, rows()[:3], make_scaler(alone.device, torch.float32), alone)
    assert _Observed.seen == [(threading.get_ident(), False)] * 3
    assert torch._C._is_multithreading_enabled()


@pytest.mark.parametrize("nested", [False, True])
def test_what_a_failed_backward_had_to_do_keeps_nothing(nested: bool) -> None:
    """The step that is done again has as much memory as the first."""
    x, kept = torch.ones(3, requires_grad=True), torch.ones(3)
    alive = weakref.ref(kept)
    other = x * kept
    # Made last, it goes back first; nested, in a backward within the backward.
    loss = (other + (checkpoint(Fails.apply, x, use_reentrant=True) if nested else Fails.apply(x))).sum()
    with pytest.raises(torch.OutOfMemoryError), in_this_thread():
        loss.backward()
    del kept, other, loss
    gc.collect()
    assert alive() is None
    assert torch._C._is_multithreading_enabled()
