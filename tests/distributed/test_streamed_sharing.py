"""Ranks that share each sequence under the streamed executor: loss and gradients against one rank's ordinary pass."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from elite.attention import DOCUMENT_SDPA
from elite.data.batches import Batch
from elite.distributed.exchange import Exchange
from elite.distributed.ranks import Ranks
from elite.executor.streamed.attach import attach
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.streamed.kernels import KERNELS
from elite.executor.whole import WholeExecutor
from elite.optimizations.ring_attention import Variant
from elite.streaming import Keep, Place, Streaming
from elite.training.step import accumulate, make_scaler
from tests.distributed.forked import together
from tests.distributed.test_sharing import WINDOWS
from tests.models import tiny
from tests.test_attention import row
from tests.training.rig import ALONE

SMALL = Streaming(chunk=8, block=16, keep=Keep.layers)
CASES: dict[str, tuple[list[Batch], Streaming, Variant]] = {
    "even, in one chunk and lap": (WINDOWS["even"], replace(SMALL, chunk=64, block=64), Variant.ring),
    "odd": (WINDOWS["odd"], SMALL, Variant.ring),
    "odd, outputs kept": (WINDOWS["odd"], replace(SMALL, block=8, keep=Keep.attention), Variant.all_gather),
    "packed, all on the host": (WINDOWS["packed"], replace(SMALL, keys_values=Place.host, keep=Keep.attention), Variant.ring),
    "packed, recomputed": (WINDOWS["packed"], replace(SMALL, keep=Keep.multilevel, slots=1, boundaries=Place.device), Variant.ring),
    "rows, accumulated": (WINDOWS["rows, accumulated"], replace(SMALL, chunk=16, boundaries=Place.disk), Variant.ring),
    "short documents, gathered": ([row(*[3] * 12, 1)], replace(SMALL, chunk=5, block=7, keys_values=Place.host), Variant.all_gather),
}
OF_FOUR = ("odd", "packed, all on the host", "rows, accumulated", "short documents, gathered")
Found = dict[str, tuple[float, dict[str, Tensor]]]


def gradients(ranks: Ranks, kind: str, case: str, folder: Path) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a window: of one rank by an ordinary pass, of several by shared streamed ones."""
    window, layout, variant = CASES[case]
    model: Any = tiny(kind, DOCUMENT_SDPA, num_hidden_layers=3)
    executor: Any = WholeExecutor(model, torch.float32)
    if ranks.world > 1:
        attach(model, replace(layout, folder=str(folder / str(ranks.rank))), choice=lambda shape: KERNELS["math"])
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        executor = StreamedExecutor(wrapped, torch.float32, Exchange(ranks, variant, torch.distributed.new_group()))
    mine = [batch.shared(ranks.rank, ranks.world) for batch in window]
    loss = accumulate(executor, mine, make_scaler(ranks.device, torch.float32), ranks)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def all_gradients(kind: str, cases: Collection[str]) -> Callable[[Ranks, Path], Found]:
    def work(ranks: Ranks, folder: Path) -> Found:
        found = {case: gradients(ranks, kind, case, folder) for case in cases}
        ranks.barrier()
        return found

    return work


@pytest.mark.parametrize(("kind", "count", "cases"), [("llama", 4, OF_FOUR), ("phi", 2, CASES)])
def test_loss_and_gradients_are_one_ranks(kind: str, count: int, cases: Collection[str], tmp_path: Path) -> None:
    expected = all_gradients(kind, cases)(ALONE, tmp_path)
    for rank, found in enumerate(together(tmp_path, count, all_gradients(kind, cases))):
        for case, (loss, of_parameters) in expected.items():
            assert found[case][0] == pytest.approx(loss, rel=1e-5), (rank, case)
            assert found[case][1].keys() == of_parameters.keys()
            # A key's bias has no gradient but rounding: softmax does not see it.
            most = max(gradient.norm().item() for gradient in of_parameters.values())
            for name, gradient in of_parameters.items():
                error = (found[case][1][name] - gradient).norm().item()
                assert error <= max(1e-5 * gradient.norm().item(), 1e-7 * most), (rank, case, name)
