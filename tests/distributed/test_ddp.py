"""Data parallel ranks against one rank: the same loss and gradients, one exchange a step, and a run that goes on on other ranks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from elite import compose, modes, worker
from elite.attention import DOCUMENT_EAGER
from elite.callbacks import metrics_file
from elite.continued import flat
from elite.data.batches import Batch
from elite.distributed.ranks import Ranks
from elite.errors import CheckpointError
from elite.executor.build import _in_parallel
from elite.executor.whole import WholeExecutor
from elite.model import LoadedModel
from elite.optimizations.power_sgd import PowerSGD
from elite.plan import make_plan
from elite.redealt import redealt
from elite.retention import CheckpointConfig
from elite.runfolder import RunFolder
from elite.schema import from_yaml
from elite.training.saving import Saver
from elite.training.step import accumulate, make_scaler
from tests.distributed.forked import together
from tests.models import tiny
from tests.optimizations.test_all import ALONE
from tests.plan.helpers import CORPUS, device, phi2, run_config
from tests.test_attention import row
from tests.training.rig import fitted, rig, weights

LENGTHS = (24, 7, 31, 12, 3, 18, 26, 9)
"""Of the sequences of a step: no two ranks or micro-batches have as many tokens to score."""


def window(rank: int, world: int) -> list[Batch]:
    """A rank's sequences of the step, a micro-batch each."""
    return [row(*((length,) if length % 2 else (length, 5)), seed=place) for place, length in enumerate(LENGTHS) if place % world == rank]


def step(ranks: Ranks) -> dict[str, Any]:
    """Loss and gradients of one step, and the buckets of gradients that were exchanged in it."""
    model = tiny("llama", DOCUMENT_EAGER, hidden_size=32)
    exchanged = list[int]()
    wrapped: Any = model
    if ranks.world > 1:
        wrapped = _in_parallel(LoadedModel(model, model, {}))

        def counted(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            exchanged.append(bucket.index())
            return allreduce_hook(wrapped.process_group, bucket)

        wrapped.register_comm_hook(None, counted)
    executor, scaler = WholeExecutor(wrapped, torch.float32), make_scaler(ranks.device, torch.float32)
    loss = accumulate(executor, window(ranks.rank, ranks.world), scaler, ranks)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "loss": loss,
        "gradients": gradients,
        "exchanged": exchanged,
        "places": len({g.untyped_storage().data_ptr() for g in gradients}),
    }


def off(one: list[Tensor], two: list[Tensor]) -> float:
    """Relative distance."""
    a, b = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (one, two))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_one_rank(world: int, tmp_path: Path) -> None:
    expected = step(ALONE)
    found = together(tmp_path, world, lambda ranks, _: step(ranks))
    for one in found:
        assert one["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert off(one["gradients"], expected["gradients"]) <= 1e-5
        assert one["exchanged"] == [0], f"one exchange for {len(LENGTHS) // world} micro-batches"
        assert one["places"] == 1 < expected["places"], "gradients stay where they have been exchanged"


def run(ranks: Ranks, folder: Path, saved: Path | None = None) -> dict[str, Any]:
    """Four steps of four sequences, saved after two; or the last two of them."""
    trainer = rig(folder, (), 4, ranks=ranks, accumulation=4 // ranks.world)
    trainer.keep = CheckpointConfig(milestone_every=2)
    trainer.saver = Saver(trainer.checkpoints, trainer.keep)
    if saved is not None:
        trainer.resume(saved)
    lines = fitted(trainer).steps
    return {"losses": [line["loss"] for line in lines], "weights": weights(trainer), "val": trainer.progress.last_val["val_loss"]}


def test_saved_on_two_ranks_it_goes_on_on_one_and_on_four(tmp_path: Path) -> None:
    """Four sequences a step, however they are dealt."""
    whole = together(tmp_path / "two", 2, lambda ranks, folder: run(ranks, folder))[0]
    assert whole["losses"][3] != pytest.approx(whole["losses"][2], rel=1e-3), "the loss must move to mean anything"
    saved = tmp_path / "two" / "checkpoints" / "step_000002"
    for world in (1, 4):
        found = together(tmp_path / str(world), world, lambda ranks, folder: run(ranks, folder, saved))
        assert found[0]["losses"] == pytest.approx(whole["losses"][2:], rel=1e-5) and len(found[0]["losses"]) == 2
        assert found[0]["val"] == pytest.approx(whole["val"], rel=1e-5)
        assert all(off(one["weights"], whole["weights"]) <= 1e-4 for one in found)


def test_a_plan_is_dealt_to_other_ranks() -> None:
    """As many sequences a step, and everything else that a run is begun with."""
    usual = run_config(4096)
    begun = replace(usual, training=replace(usual.training, micro_batch=2, global_batch_tokens=16 * 4096))
    card = device("h100")
    plans = {count: make_plan(begun, replace(card, count=count), phi2(), CORPUS).to_dict() for count in (1, 2, 4, 8)}
    for count in (1, 4, 8):
        config, plan = redealt(begun, plans[2], replace(card, count=count), phi2())
        assert (plan["ranks"], plan["accumulation"], plan["micro_batch"]) == (count, 8 // count, 2)
        assert plan == plans[count] and flat(config) == flat(begun) | {"hardware.gpus": count}
    _, plan = redealt(begun, plans[2], replace(card, count=16), phi2())
    assert (plan["ranks"], plan["accumulation"], plan["micro_batch"]) == (16, 1, 1), "smaller micro-batches where there is one a rank"
    with pytest.raises(CheckpointError, match="begun on 2 ranks, here are 3: a step's 16 sequences cannot be dealt equally to 3 ranks"):
        redealt(begun, plans[2], replace(card, count=3), phi2())
    with pytest.raises(CheckpointError, match=r"here are 1: that does not fit \(.*too much"):
        redealt(begun, plans[2], replace(card, count=1, memory_usable_bytes=2**32), phi2())
    compressed = replace(begun, optimizations=replace(begun.optimizations, power_sgd=PowerSGD.Config(enabled=True)))
    pair = make_plan(compressed, replace(card, count=2), phi2(), CORPUS).to_dict()
    with pytest.raises(CheckpointError, match=r"optimizations\.power_sgd would act on one number of ranks and not on the other"):
        redealt(compressed, pair, replace(card, count=1), phi2())
    del pair["decisions"]
    with pytest.raises(CheckpointError, match="does not say its decisions"):
        redealt(begun, pair, replace(card, count=1), phi2())


TINY = (
    *("debug=tiny", "optimizations=none", "hardware=cpu", "training.completion_tokens=0", "training.val_every=2", "training.max_steps=4"),
    *("training.checkpoint_every=2", "checkpoint.milestone_every=2", "training.global_batch_tokens=1024", "training.micro_batch=1"),
)


def carried_out(folder: RunFolder, world: int, meeting: Path) -> dict[str, Any]:
    """The run in the folder on so many ranks, to its end: losses by step, and what was validated last."""

    def work(ranks: Ranks, _: Path) -> None:
        worker.train(folder, ranks)

    together(meeting, world, work)
    losses = {line["step"]: line["loss"] for line in metrics_file.read(folder.metrics) if "loss" in line}
    return {"losses": losses, "val": json.loads(folder.summary.read_text())["val_last"]}


@pytest.mark.slow
def test_a_run_saved_on_two_ranks_goes_on_on_one_and_on_four(
    tmp_path: Path, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as a command does it: the run's folder is dealt anew, and its results are the same."""
    monkeypatch.chdir(tmp_path)
    where = (f"data.repo={repository}", f"output.cache={cache}", "hardware=cpu")
    begun, processes = modes._prepare(compose.from_overrides(*TINY, *where, "hardware.gpus=2"))
    assert processes == 2
    whole = carried_out(begun, 2, tmp_path / "pair")
    assert whole["losses"][4] != pytest.approx(whole["losses"][2], rel=1e-3), "the loss must move to mean anything"
    for world in (1, 4):
        # As it was when its first half was saved.
        folder = RunFolder(Path(shutil.copytree(begun.path, tmp_path / f"on_{world}")))
        folder.summary.unlink()
        shutil.rmtree(folder.checkpoints / "step_000004")
        again, processes = modes._prepare(compose.from_overrides(*where, f"resume={folder.path}", f"hardware.gpus={world}"))
        plan = json.loads(again.plan.read_text())
        assert (again.path, processes) == (folder.path, world)
        assert (plan["ranks"], plan["accumulation"], from_yaml(again.config).hardware.gpus) == (world, 4 // world, world)
        found = carried_out(again, world, tmp_path / f"of_{world}")
        assert found["losses"] == pytest.approx(whole["losses"], rel=1e-5) and list(found["losses"]) == [1, 2, 3, 4]
        assert found["val"] == pytest.approx(whole["val"], rel=1e-5)
