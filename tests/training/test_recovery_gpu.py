"""Memory of a real GPU that runs out, under a real cap: the step is done again in smaller passes, and nothing of the first try stays."""

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from elite.data.batches import Batch, random_batch
from elite.distributed.ranks import Ranks
from elite.executor.streamed.attach import attach
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.streamed.math_kernel import MATH
from elite.executor.whole import WholeExecutor
from elite.streaming import Streaming
from elite.training.recovery import Recovery
from elite.training.step import make_scaler
from tests.models import tiny

pytestmark = pytest.mark.gpu
VOCAB = 8192
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
}
SPARE = 1.25
"""What the small pass takes is less than the cap by this factor; the larger ones take twice as much and more."""


@pytest.fixture
def where() -> Iterator[torch.device]:
    device = torch.device("cuda", 0)
    _settle()
    yield device
    torch.cuda.set_per_process_memory_fraction(1.0, device)
    _settle()


def _settle() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def gradients(recovery: Recovery, executor: Any, window: Sequence[Batch]) -> tuple[float, list[Tensor]]:
    """Loss and gradients, which are cleared."""
    device = recovery.ranks.device
    loss = recovery.accumulate(executor, window, make_scaler(device, torch.float32), recovery.ranks)
    found = [parameter.grad.cpu() for parameter in recovery.parameters if parameter.grad is not None]
    for parameter in recovery.parameters:
        parameter.grad = None
    return loss, found


def compare(small: tuple[float, list[Tensor]], large: tuple[float, list[Tensor]]) -> None:
    """Within EQUAL: the same sums in another order."""
    assert large[0] == pytest.approx(small[0], abs=1e-4) and len(small[1]) == len(large[1]) > 0
    for one, two in zip(small[1], large[1], strict=True):
        assert (one - two).norm() <= 1e-3 * one.norm() + 1e-7


def cap(device: torch.device) -> None:
    """Allow a little more than what has been needed so far."""
    allowed = SPARE * torch.cuda.max_memory_reserved(device)
    _settle()
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(device).total_memory, device)


def test_a_micro_batch_that_does_not_fit(where: torch.device) -> None:
    model: Any = tiny("llama", **SIZES)
    model.to(where)
    parameters, ranks = list(model.parameters()), Ranks(0, 1, where)
    executor = WholeExecutor(model, torch.float32)
    window = [random_batch(8, 1024, VOCAB, torch.Generator().manual_seed(i), tail=8) for i in range(2)]
    small = gradients(Recovery(parameters, ranks, pass_tokens=2 * 1024), executor, window)
    cap(where)
    before = torch.cuda.memory_allocated(where)
    recovery = Recovery(parameters, ranks)
    large = gradients(recovery, executor, window)
    assert recovery.count >= 2 and recovery.rows(1024, 8) <= 2
    compare(small, large)
    _settle()
    # cuBLAS keeps its workspaces.
    assert torch.cuda.memory_allocated(where) - before < 64 * 2**20


def test_a_chunk_that_does_not_fit(where: torch.device) -> None:
    model: Any = tiny("llama", **SIZES)
    model.to(where)
    parameters, ranks = list(model.parameters()), Ranks(0, 1, where)
    window = [random_batch(1, 8192, VOCAB, torch.Generator().manual_seed(0))]
    attached = attach(model, Streaming(chunk=1024, block=4096), where, lambda shape: MATH)
    executor = StreamedExecutor(model, torch.float32)
    small = gradients(Recovery(parameters, ranks, attached.runner), executor, window)
    attached.undo()
    cap(where)
    attached = attach(model, Streaming(chunk=8192, block=4096), where, lambda shape: MATH)
    recovery = Recovery(parameters, ranks, attached.runner)
    large = gradients(recovery, executor, window)
    assert recovery.count >= 1 and recovery.chunk is not None and 512 <= recovery.chunk <= 4096
    compare(small, large)
    attached.undo()
