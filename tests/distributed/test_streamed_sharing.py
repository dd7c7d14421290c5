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
from elite.data.batches import IGNORE, Batch, random_batch
from elite.distributed.exchange import Exchange
from elite.distributed.ranks import Ranks
from elite.distributed.ring import Ring
from elite.executor.streamed.attach import attach
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.streamed.kernels import KERNELS, AttentionShape, Kernel
from elite.executor.whole import WholeExecutor
from elite.model import apply_stage
from elite.optimizations import decide
from elite.optimizations.contract import Stage
from elite.optimizations.ring_attention import Variant
from elite.plan.streamed import StreamedMemory
from elite.streaming import Keep, Place, Streaming
from elite.training.live_bytes import LiveBytes
from elite.training.step import accumulate, make_scaler
from elite.training.trial import Subject, attempt, one_pass
from elite.training.validation import Validator
from tests.distributed.forked import assert_one_ranks, together
from tests.distributed.test_sharing import WINDOWS
from tests.models import tiny
from tests.optimizations.test_all import only
from tests.plan.helpers import switches
from tests.plan.steps import Case, as_on_cuda, built, decisions_of, facts_of, tensors
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
            assert_one_ranks(found[case][1], of_parameters, rank, case)


def held_out() -> list[Batch]:
    """Rows of which the end is scored, one of them too short to be shared."""
    found = [row(53), row(40, seed=2), row(7, seed=3)]
    for batch in found:
        batch.labels[:, : -min(10, batch.context - 2)] = IGNORE
    return found


def validated(ranks: Ranks, folder: Path) -> dict[str, tuple[float, int]]:
    """The mean loss under each executor, and the tokens of the longest pass."""
    found = {}
    for name in ("whole", "whole, fused loss", "streamed"):
        model: Any = tiny("llama", DOCUMENT_SDPA)
        sharing: Any = None
        if name == "streamed":
            attach(model, SMALL, choice=lambda shape: KERNELS["math"])
            sharing = Exchange(ranks) if ranks.world > 1 else None
            executor: Any = StreamedExecutor(model, torch.float32, sharing)
        else:
            if name != "whole":
                apply_stage(Stage.executor, only("fused_loss"), model)
            sharing = Ring(ranks, lambda shape: KERNELS["math"]) if ranks.world > 1 else None
            executor = WholeExecutor(model, torch.float32, name != "whole", sharing)
        validator = Validator(executor, held_out(), held_out()[1:], ranks, sharing=sharing)
        found[name] = validator()["val_loss"], validator.longest
    return found


def test_validation_is_shared_and_one_ranks(tmp_path: Path) -> None:
    expected = validated(ALONE, tmp_path)
    for found in together(tmp_path, 4, validated):
        for name, (loss, longest) in expected.items():
            assert found[name][0] == pytest.approx(loss, rel=1e-5), name
            assert longest == 53 and found[name][1] <= 15, "no rank holds a whole row"


class Hollow(Kernel):
    """Takes what a library's kernel takes, and computes nothing."""

    name = "hollow"

    def supports(self, shape: AttentionShape, device: torch.device) -> None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[1], len(q), dtype=torch.float32)

    def backward_by_head(self, do: Tensor, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        dk, dv = (k.new_zeros(len(k), *q.shape[1:]) for _ in range(2))
        return torch.zeros_like(q), dk, dv


MEASURED = Case("llama", ("mixed_precision", "fused_lora", "ring_attention"), cuda=True, tokens=512, vocab=64, mlp=0.5)
LAYOUTS = {
    "a meeting is the peak": Streaming(chunk=64, block=512, boundaries=Place.device),
    "all on the host": Streaming(chunk=128, block=128, keys_values=Place.host, keep=Keep.attention),
}


def planned(layout: Streaming) -> tuple[float, float]:
    """What `peaks` finds, by the plan."""
    found = replace(facts_of(MEASURED), executor="streamed", sharing=2)
    found = replace(found, device=replace(found.device, count=2))
    memory = StreamedMemory(found, decide(switches(*MEASURED.on), found))
    work = memory.device(layout)
    return work.saved_activations + work.layer_workspace + work.mlp_workspace + work.attention_workspace, memory.host(layout)


def peaks(ranks: Ranks, folder: Path) -> dict[str, tuple[float, ...]]:
    """Bytes alive at once in a pass, rows aside, and when rank 1 tries it alone; and bytes of rows on the host."""
    found: dict[str, tuple[float, ...]] = {}
    batch = random_batch(1, MEASURED.tokens, MEASURED.vocab, torch.Generator().manual_seed(0)).shared(ranks.rank, ranks.world)
    for name, layout in LAYOUTS.items():
        model = built(MEASURED, decisions_of(MEASURED, facts_of(MEASURED)))
        attached = attach(model, layout, choice=lambda shape: Hollow())
        exchange = Exchange(ranks)
        executor, live, tried = StreamedExecutor(model, torch.bfloat16, exchange), LiveBytes(), 0.0
        with as_on_cuda():
            executor.loss_sum(batch).backward()
            if layout.boundaries is Place.device:
                # On a CPU rows on the host are brought to buffers, which are no rows.
                live.ignore([*tensors(model), *(p.grad for p in model.parameters() if p.grad is not None)])
                with live:
                    executor.loss_sum(batch).backward()
                if ranks.rank == 1:
                    given = executor, torch.bfloat16, [p for p in model.parameters() if p.requires_grad], MEASURED.vocab
                    subject = Subject(*given, MEASURED.tokens, ranks.device, 1e9, 0.0, exchange)
                    trial = attempt(subject, 1, one_pass(subject, 1), gradients=True)
                    tried = trial.peak_bytes - trial.resident_bytes - sum(p.nbytes for p in given[2])
        found[name] = live.peak, tried, attached.runner.allocator.host_bytes()
    ranks.barrier()
    return found


def test_ranks_hold_what_is_planned(tmp_path: Path) -> None:
    for rank, found in enumerate(together(tmp_path, 2, peaks)):
        for name, layout in LAYOUTS.items():
            (peak, tried, on_host), (planned_peak, planned_host) = found[name], planned(layout)
            if layout.boundaries is Place.device:
                assert planned_peak == pytest.approx(peak, rel=0.05), name
                assert rank == 0 or tried == pytest.approx(peak, rel=0.01), name
            else:
                assert on_host == planned_host, name
