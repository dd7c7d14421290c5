"""Ranks that share each sequence: data, loss, gradients and whole runs against one rank's."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from elite import compose, geometry, hardware, modes, worker
from elite.attention import DOCUMENT_SDPA
from elite.callbacks import metrics_file
from elite.config import DataConfig
from elite.data.batches import Batch, TrainStream
from elite.distributed.ranks import Ranks
from elite.distributed.ring import Ring
from elite.errors import PlanError
from elite.executor.streamed.kernels import KERNELS
from elite.executor.whole import WholeExecutor
from elite.facts import Corpus
from elite.model import apply_stage
from elite.optimizations.contract import Stage
from elite.optimizations.ring_attention import Variant
from elite.plan import make_plan
from elite.plan.table import render
from elite.runfolder import RunFolder
from elite.training.step import accumulate, make_scaler
from elite.zigzag import held
from tests.distributed.forked import assert_one_ranks, together
from tests.models import tiny
from tests.optimizations.test_all import only
from tests.test_attention import row
from tests.training.rig import ALONE, CONTEXT, SEED, corpus

Found = dict[str, tuple[float, dict[str, Tensor]]]


def rows(*batches: Batch) -> Batch:
    """Batches of equal length as one."""
    ids, labels, positions = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("input_ids", "labels", "position_ids"))
    return Batch(ids, labels, positions, tuple(documents for batch in batches for documents in batch.documents))


WINDOWS = {
    "even": [row(40)],
    "odd": [row(37)],
    "packed": [row(5, 22, 10, 1)],
    "rows, accumulated": [rows(row(20, 17), row(37, seed=2)), rows(row(1, 36, seed=3), row(9, 9, 19, seed=4))],
}
PARTS = ("gradient_checkpointing", "fused_loss")


def gradients(ranks: Ranks, kind: str, window: list[Batch], parts: tuple[str, ...], variant: Variant) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a window, each sequence shared by all ranks."""
    model: Any = tiny(kind, DOCUMENT_SDPA)
    for name in parts:
        apply_stage(Stage.executor, only(name), model)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if ranks.world > 1 else model
    ring = Ring(ranks, lambda shape: KERNELS["math"], variant, torch.distributed.new_group()) if ranks.world > 1 else None
    executor = WholeExecutor(wrapped, torch.float32, "fused_loss" in parts, ring)
    mine = [batch.shared(ranks.rank, ranks.world) for batch in window]
    loss = accumulate(executor, mine, make_scaler(ranks.device, torch.float32), ranks)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def all_gradients(kind: str) -> Callable[[Ranks, Path], Found]:
    def work(ranks: Ranks, folder: Path) -> Found:
        found = {
            f"{name} {words} {variant.value}": gradients(ranks, kind, window, parts, variant)
            for name, window in WINDOWS.items()
            for variant, words, parts in ((Variant.ring, "", ()), (Variant.all_gather, "with parts", PARTS))
        }
        ranks.barrier()
        return found

    return work


@pytest.mark.parametrize(("kind", "count"), [("llama", 4), ("phi", 2)])
def test_loss_and_gradients_are_one_ranks(kind: str, count: int, tmp_path: Path) -> None:
    expected = all_gradients(kind)(ALONE, tmp_path)
    for rank, found in enumerate(together(tmp_path, count, all_gradients(kind))):
        for case, (loss, of_parameters) in expected.items():
            assert found[case][0] == pytest.approx(loss, rel=1e-5), (rank, case)
            assert_one_ranks(found[case][1], of_parameters, rank, case)


def test_ranks_that_share_get_the_same_rows(tmp_path: Path) -> None:
    store = corpus(tmp_path)

    def stream(rank: int, world: int, sharing: int) -> TrainStream:
        return TrainStream(store, DataConfig(), CONTEXT, 2, SEED, False, rank, world, sharing=sharing)

    whole, parts = stream(0, 1, 1), [stream(rank, 2, 2) for rank in range(2)]
    for batch, *shares in zip(whole.next_window(3), *(part.next_window(3) for part in parts), strict=True):
        for rank, share in enumerate(shares):
            tokens = [token for piece in held(CONTEXT, rank, 2) for token in piece]
            for name in ("input_ids", "labels", "position_ids"):
                assert torch.equal(getattr(share, name), getattr(batch, name)[:, tokens]), name
            assert share.documents == batch.documents and (share.context, share.slots) == (CONTEXT, 2 * CONTEXT)
        assert sum(share.label_tokens for share in shares) == batch.label_tokens
    assert parts[0].state() == parts[1].state() == whole.state()
    # Two groups of two ranks: each pair has rows of its own.
    pairs = [stream(rank, 4, 2).next_window(1)[0] for rank in range(4)]
    first, second = (part.next_window(1)[0] for part in (stream(0, 2, 1), stream(1, 2, 1)))
    for rank, batch in ((0, first), (1, first), (2, second), (3, second)):
        assert torch.equal(pairs[rank].input_ids, batch.shared(rank % 2, 2).input_ids)


RUN = (
    *("debug=tiny", "training.completion_tokens=0", "training.max_steps=2", "training.val_every=2", "training.checkpoint_every=100"),
    *("optimizations=none", "optimizations.sequence_packing.enabled=true", "adapter.dropout=0", "training.preflight=true"),
    "data.val_sequences=1",
)
SHARED = ("hardware.gpus=2", "optimizations.ring_attention.enabled=true")


def run(ranks: int, folder: Path, repository: Path, cache: Path, *overrides: str) -> list[dict[str, Any]]:
    """What a run of the whole program, but for the launch, writes about its steps and validations."""
    shown = f"output.cache={cache}", f"data.repo={repository}", f"output.root={folder}"
    made, _ = modes._prepare(compose.from_overrides(*RUN, *overrides, *shown))

    def train(ranks: Ranks, folder: Path) -> None:
        worker.train(RunFolder(made.path), ranks)

    if ranks == 1:
        train(ALONE, folder)
    else:
        together(folder / "ranks", ranks, train)
    return metrics_file.read(made.metrics)


def test_a_run_whose_ranks_share_each_sequence_is_the_run_of_one(tmp_path: Path, repository: Path, cache: Path) -> None:
    alone = run(1, tmp_path / "alone", repository, cache)
    for executor, layout in (("whole", ()), ("streamed", ("executor.chunk=48", "executor.block=100"))):
        shared = run(2, tmp_path / executor, repository, cache, *SHARED, f"executor={executor}", *layout)
        for key in ("loss", "val_loss", "val_loss_alone", "grad_norm"):
            of_both = [[line[key] for line in lines if key in line] for lines in (alone, shared)]
            assert of_both[1] == pytest.approx(of_both[0], rel=2e-5) and of_both[0], (executor, key)
        for key in ("step", "tokens", "context"):
            assert [line.get(key) for line in shared] == [line.get(key) for line in alone], (executor, key)


def plan_of(*overrides: str) -> Any:
    config = compose.from_overrides("debug=tiny", *overrides).config
    config = replace(config, tier=replace(config.tier, context=4096, target_length=512))
    device = replace(hardware.device(config.hardware), count=config.hardware.gpus or 1)
    return make_plan(config, device, geometry.shape(config.model), Corpus("", 1, 1, 10**6, 10**5, 10**7, "exact"))


def test_the_plan_of_shared_sequences() -> None:
    tokens = "training.global_batch_tokens=16384"
    alone, shared = plan_of(tokens), plan_of(tokens, *SHARED)
    assert (shared.accumulation, shared.step_tokens) == (alone.accumulation, alone.step_tokens)
    assert shared.step_flops == pytest.approx(alone.step_flops / 2, rel=1e-6)
    assert shared.memory["saved_activations"] <= 0.6 * alone.memory["saved_activations"]
    assert shared.exchanged["keys and values"] > 0 == len(alone.exchanged)
    printed = Console(width=200, record=True, file=io.StringIO())
    printed.print(render(shared))
    text = printed.export_text()
    assert "× 4 accumulated, shared by 2 ranks" in text and "a rank and step: keys and values" in text
    (switch,) = (switch for switch in shared.decisions if switch.name == "ring_attention")
    assert switch.active
    (switch,) = (switch for switch in plan_of(tokens, SHARED[1]).decisions if switch.name == "ring_attention")
    assert switch.requested and not switch.active and "one rank has no other" in switch.reason


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("training.mid_step_checkpoint=true", "executor=streamed", "executor.boundaries=disk"), "cannot be cut off alike"),
        (("optimizations.sliding_window.enabled=true", "optimizations.sliding_window.window=64"), "a window of 64 tokens"),
    ],
)
def test_what_cannot_be_shared_is_refused(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        plan_of(*SHARED, *overrides)
