"""PowerSGD between two ranks against the plain exchange, its own recurrence, and a run without interruption."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from elite import checkpoint, geometry
from elite.distributed.ranks import Ranks
from elite.facts import Facts
from elite.optimizations import ALL, OptimizationsConfig, decide
from elite.optimizations.contract import Decision, Estimate, Step
from elite.optimizations.functions.exchange import LowRankExchange
from elite.optimizations.power_sgd import PowerSGD
from elite.plan.exchange import exchanges
from elite.retention import CheckpointConfig
from elite.training.saving import Saver
from tests.distributed.forked import together
from tests.models import tiny
from tests.optimizations.test_all import FACTS, SHAPE
from tests.training.rig import fitted, rig, weights

PAIR = replace(FACTS, device=replace(FACTS.device, count=2))
ROWS = 2
"""Of a rank's batch: gradients of two ranks have rank 4 at most."""


def square() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 48, bias=False))


def batch(rank: int, step: int) -> Tensor:
    return torch.randn(ROWS, 48, generator=torch.Generator().manual_seed(10 * step + rank))


class Counted:
    """Counts the bytes that are handed to `all_reduce` while it is in place."""

    def __init__(self) -> None:
        self.bytes = 0
        self._real = dist.all_reduce

    def __enter__(self) -> "Counted":
        def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            self.bytes += tensor.nbytes
            return self._real(tensor, *arguments, **options)

        dist.all_reduce = counting
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_reduce = self._real


def exchanged(ranks: Ranks, steps: int, rank: int, feedback: bool, warm: bool = True, start: int = 2) -> dict[str, Any]:
    """Gradients of each exchange without an update, those of a plain one, and bytes."""
    # Each layer's gradients are a part of their own.
    model = DistributedDataParallel(square(), bucket_cap_mb=0.008)
    hook = LowRankExchange("power_sgd", model, rank, start, feedback, warm, 2, 0)
    found, plain, metrics = [], [], []
    with Counted() as counted:
        for step in range(steps):
            model.zero_grad()
            before = counted.bytes
            model(batch(ranks.rank, step)).square().sum().backward()
            hook.gradients(list(model.parameters()), step + 1)
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            metrics.append(hook.metrics() | {"counted": counted.bytes - before})
    for step in range(steps):
        alone = square()
        (alone(torch.cat([batch(other, step) for other in range(ranks.world)])).square().sum() / ranks.world).backward()
        plain.append([p.grad for p in alone.parameters() if p.grad is not None])
    return {"found": found, "plain": plain, "metrics": metrics, "counts": hook.counts()}


def off(one: Sequence[Tensor], two: Sequence[Tensor]) -> float:
    """Relative distance."""
    a, b = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (one, two))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("warm", [True, False])
def test_at_sufficient_rank_it_is_the_whole_exchange(warm: bool, tmp_path: Path) -> None:
    one, two = together(tmp_path, 2, lambda ranks, _: exchanged(ranks, 6, rank=8, feedback=True, warm=warm))
    for step in range(6):
        assert off(one["found"][step], one["plain"][step]) <= 1e-5, step
        assert all(torch.equal(a, b) for a, b in zip(one["found"][step], two["found"][step], strict=True)), "ranks differ"
    sent = [line["exchanged_bytes"] for line in one["metrics"]]
    assert sent[0] == sent[1] > 2 * sent[2] == 2 * sent[5], "two plain ones first, then factors"


def test_at_rank_one_it_is_as_much_smaller_as_stated(tmp_path: Path) -> None:
    one, _ = together(tmp_path, 2, lambda ranks, _: exchanged(ranks, 5, rank=1, feedback=True))
    whole, factors = 4 * (2 * 40 * 48 + 40), 4 * (2 * (40 + 48) + 40)
    for step, line in enumerate(one["metrics"]):
        assert line["exchanged_bytes"] == line["counted"] == (whole if step < 2 else factors)
        assert line["exchange_compression"] == pytest.approx(1 if step < 2 else whole / factors)
    assert one["counts"] == {
        "exchanges": 5,
        "exchanged_bytes": 2 * whole + 3 * factors,
        "compression": pytest.approx(5 * whole / (2 * whole + 3 * factors)),
    }
    assert off(one["found"][4], one["plain"][4]) > 0.1, "rank one cannot hold a gradient of rank four"


def test_error_feedback_makes_up_for_what_was_left_out(tmp_path: Path) -> None:
    """The sum over steps comes near the true one; without, what is left out is lost."""

    def both(ranks: Ranks, _: Path) -> list[Any]:
        return [exchanged(ranks, 40, rank=1, feedback=feedback) for feedback in (True, False)]

    (fed, bare), _ = together(tmp_path, 2, both)
    missing = []
    for run in (fed, bare):
        sums = [[torch.stack(step).sum(0) for step in zip(*run[name], strict=True)] for name in ("found", "plain")]
        missing.append(off(*sums))
    assert fed["found"][2][0].equal(bare["found"][2][0]) and not fed["found"][3][0].equal(bare["found"][3][0])
    assert missing[0] < missing[1] / 2, missing


def chosen(**options: Any) -> tuple[Decision, ...]:
    switched = replace(OptimizationsConfig(), power_sgd=PowerSGD.Config(enabled=True, **options))
    return decide(switched, PAIR)


def trained(ranks: Ranks, folder: Path, steps: int, stop: int = 0, **options: Any) -> dict[str, Any]:
    """A run of adapters over two ranks; begun anew from the checkpoint after step `stop`, if there is one."""
    decisions = chosen(**options) if options else ()
    trainer = rig(folder, decisions, steps, ranks=ranks, rank=16)
    trainer.keep = CheckpointConfig(milestone_every=4)
    trainer.saver = Saver(trainer.checkpoints, trainer.keep)
    if stop:
        trainer.resume(folder / "checkpoints" / f"step_{stop:06d}")
    seen = fitted(trainer)
    return {
        "losses": [line["loss"] for line in seen.steps],
        "lines": seen.steps,
        "weights": weights(trainer),
        "counts": [hook.counts() for hook in trainer.hooks],
    }


@pytest.mark.parametrize("options", [{"start_iteration": 3}, {"start_iteration": 2, "error_feedback": False, "warm_start": False}])
def test_a_run_that_continues_ends_bit_for_bit_as_one_that_was_not_interrupted(options: dict[str, Any], tmp_path: Path) -> None:
    def work(ranks: Ranks, folder: Path) -> list[Any]:
        whole = trained(ranks, folder, 8, rank=2, **options)
        ranks.barrier()
        return [whole, trained(ranks, folder, 8, stop=4, rank=2, **options)]

    for whole, again in together(tmp_path, 2, work):
        assert len(again["lines"]) == 4 or not again["lines"], "rank 0 alone is told"
        assert again["losses"] == whole["losses"][-len(again["losses"]) :]
        assert all(torch.equal(a, b) for a, b in zip(again["weights"], whole["weights"], strict=True))
        assert again["counts"] == whole["counts"]
    kept = checkpoint.load_state(tmp_path / "checkpoints" / "step_000008")["hooks"]["power_sgd"]
    trainable = sum(tensor.numel() for tensor in whole["weights"])
    feedback = options.get("error_feedback", True)
    assert [tensor.numel() for tensor in kept["errors"]] == ([trainable] * 2 if feedback else [])
    assert bool(kept["factors"]) == options.get("warm_start", True)
    assert not feedback or not torch.equal(*kept["errors"]), "each rank leaves out its own"
    planned = PowerSGD(PowerSGD.Config(**({"rank": 2} | options))).checkpoint_bytes(rig_facts())
    assert planned == sum(tensor.nbytes for tensor in (*kept["errors"], *kept["factors"].values()))


def test_the_loss_goes_down_a_little_less(tmp_path: Path) -> None:
    def work(ranks: Ranks, folder: Path) -> list[Any]:
        return [trained(ranks, folder / "plain", 10), trained(ranks, folder / "factors", 10, rank=2, start_iteration=2)]

    plain, found = together(tmp_path, 2, work)[0]
    effect = found["losses"][-1] - plain["losses"][-1]
    print(f"power_sgd: training loss {effect:+.4f} after 10 steps, {found['counts'][0]['compression']:.2f} times fewer bytes")
    assert found["losses"][:2] == pytest.approx(plain["losses"][:2], rel=1e-5), "plain exchanges come first"
    assert found["lines"][-1]["exchange_compression"] > 2 > 1 == found["lines"][0]["exchange_compression"]
    assert plain["losses"][-1] < found["losses"][-1] < found["losses"][0] - 0.1
    # The lines of metrics.jsonl against what a plan says.
    facts = rig_facts()
    (gradients,), (factors,) = (exchanges(facts, decisions, 1.0, 2, 2.0) for decisions in ((), chosen(rank=2)))
    assert [line["exchanged_bytes"] for line in found["lines"]] == [gradients.handed_bytes] * 2 + [factors.handed_bytes] * 8
    assert (gradients.what, factors.what) == ("gradients", "gradients as factors")


def rig_facts() -> Facts:
    """Of the runs in this file."""
    shape = geometry._shape("tiny", tiny("llama", hidden_size=64).config.to_json_string(use_diff=False))
    return replace(PAIR, model=shape, trainable_params=shape.lora_params(16))


def test_gradients_that_are_not_finite_are_forgotten(tmp_path: Path) -> None:
    def work(ranks: Ranks, _: Path) -> list[float]:
        model = DistributedDataParallel(square())
        hook = LowRankExchange("power_sgd", model, 1, 2, True, True, 2, 0)
        norms = []
        for step in range(6):
            model.zero_grad()
            bad = math.inf if step == 3 and ranks.rank == 1 else 1.0
            (model(batch(ranks.rank, step)).square().sum() * bad).backward()
            hook.gradients(list(model.parameters()), step + 1)
            norms.append(float(sum(p.grad.norm() for p in model.parameters() if p.grad is not None)))
        return [*norms, hook.counts()["forgotten"]]

    one, two = together(tmp_path, 2, work)
    assert [math.isfinite(norm) for norm in one] == [True, True, True, False, True, True, True] and one[-1] == two[-1] == 1


def test_where_it_would_do_nothing_it_says_why() -> None:
    (alone,) = (one for one in decide(replace(OptimizationsConfig(), power_sgd=PowerSGD.Config(enabled=True)), FACTS) if one.requested)
    assert not alone.active and alone.reason == "one rank exchanges nothing"
    (small,) = (one for one in chosen(rank=64) if one.requested)
    assert not small.active and small.reason == "no trained matrix is 2 times larger than its factors of rank 64"
    assert PowerSGD in ALL and [one.name for one in chosen(rank=2) if one.active] == ["power_sgd"]


def test_its_memory_is_what_was_left_out_a_copy_and_the_factors() -> None:
    one = PowerSGD(PowerSGD.Config(rank=2))
    rank, maps = 128, SHAPE.layer_linears
    factors = SHAPE.num_hidden_layers * sum(2 * (rank + width) for linear in maps for width in (linear.inputs, linear.outputs))
    assert one.memory(Step(Estimate()), PAIR).standing.total == 4 * (2 * PAIR.trainable_params + factors)
    bare = PowerSGD(PowerSGD.Config(rank=2, error_feedback=False))
    assert bare.memory(Step(Estimate()), PAIR).standing.total == 4 * factors
    assert one.memory(Step(Estimate()), FACTS).standing.total == 0
