"""What ZeRO exchanges and holds by the plan, against what DeepSpeed hands over between two ranks and what is alive on one."""

import gc
import json
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elite.bench.ranks import ZERO3
from elite.compose import from_overrides
from elite.data.batches import random_batch
from elite.distributed.gradients import gradient_exchange
from elite.distributed.ranks import Ranks
from elite.distributed.zero import Sharded, divide
from elite.executor.whole import WholeExecutor
from elite.facts import Facts
from elite.geometry import shape
from elite.model import LoadedModel
from elite.optimizations import decide, zero_2, zero_3
from elite.optimizations.contract import Decision, Exchange
from elite.optimizations.fused_loss import FusedLoss
from elite.optimizations.parts import FP32
from elite.optimizations.zero_2 import ZeRO2, active_zero
from elite.optimizations.zero_3 import ZeRO3
from elite.plan.exchange import exchanges
from elite.plan.memory import folded, host, moments, predict
from elite.report.measurement import MEASUREMENTS
from elite.training.live_bytes import LiveBytes
from elite.training.step import accumulate, make_scaler
from tests.distributed.forked import together
from tests.plan import steps
from tests.plan.helpers import device, switches
from tests.plan.steps import Case, built, facts_of

ON = ("mixed_precision", "flash_attention", "gradient_checkpointing", "fused_loss")
FULL, ADAPTERS = Case("llama", ON, full=True, tokens=256, vocab=512), Case("llama", ON, tokens=256, vocab=512, rank=64)
TWO, THREE = ZeRO2.Config(enabled=True), ZeRO3.Config(enabled=True)
TWO_OFFLOADED = ZeRO2.Config(enabled=True, offload_optimizer=True)
THREE_OFFLOADED = ZeRO3.Config(enabled=True, offload_optimizer=True, offload_parameters=True)
RANKS, PASSES, LAYERS = 2, 2, 3
STILL_THERE = 2
"""Layers at most that a forward leaves for the backward."""


class Handed(TorchDispatchMode):
    """Bytes handed over to each kind of exchange, numbers such as a loss aside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # Of what is gathered or scattered the whole, which is larger than a rank's part.
            sizes = (sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.numel() > 1) for given in args)
            self.bytes[func._overloadpacket.__name__.strip("_")] += max(sizes)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Planned:
    """What the plan says of one rank."""

    exchange: Exchange
    held: float
    """Between steps, in host memory too."""
    peak: float
    """Of passes, on the device alone."""
    layer: float
    """Bytes of one layer's weights."""


def chosen(case: Case, options: Any, kind: str) -> tuple[Facts, tuple[Decision, ...]]:
    facts = facts_of(case)
    facts = replace(facts, device=replace(facts.device, kind=kind, count=RANKS), accumulation=PASSES)
    changes: dict[str, Any] = {"zero_3" if isinstance(options, ZeRO3.Config) else "zero_2": options}
    changes["fused_loss"] = FusedLoss.Config(enabled=True, tile=steps.TILE)
    return facts, decide(replace(switches(*case.on), **changes), facts)


def planned(case: Case, options: Any) -> Planned:
    # On a CPU nothing is planned to lie elsewhere.
    facts, decisions = chosen(case, options, "cuda" if options.offload_optimizer else "cpu")
    step, (exchange,) = folded(facts, decisions), exchanges(facts, decisions, 2.0, PASSES, sweeps=3.0)
    kept, bucket = step.standing, FP32 * zero_2.BUCKET
    # Between steps nothing is exchanged, and ZeRO-2 has let go of gradients.
    gradients = kept.gradients - bucket if options.offload_optimizer or isinstance(options, ZeRO3.Config) else bucket
    lying = sum((kept.linear_weights, kept.other_weights, kept.trainable_copy, gradients, kept.optimizer_state))
    peak = max(moment.total for moment in list(moments(step, facts))[:-1])
    return Planned(exchange, lying + host(facts, decisions), peak, (FP32 if case.full else step.value) * facts.model.layer_params)


def alive() -> int:
    """Bytes of all tensors made since the last `gc.freeze`."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if isinstance(thing, Tensor) and not thing.is_meta)
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def one(case: Case, options: Any, ranks: Ranks) -> dict[str, int]:
    """What is handed over in the second step, what is held after it, and the most that its passes took besides."""
    facts, decisions = chosen(case, options, "cpu")
    zero = active_zero(decisions)
    assert zero is not None
    # What was there before is not looked at again.
    gc.freeze()
    scaler, live, handed = make_scaler(ranks.device, torch.bfloat16), LiveBytes(), Handed()
    model = built(case, tuple(decision for decision in decisions if decision.optimization is not zero))
    loaded = LoadedModel(model, model if case.full else model.base_model.model, {})
    optimizer = torch.optim.AdamW(loaded.trainable, lr=1e-2)
    settings = zero.settings(facts, "bfloat16")
    divide(loaded, settings, ranks)
    wrapped = Sharded(loaded, optimizer, settings, ranks)
    executor, exchange = WholeExecutor(wrapped, torch.bfloat16, fused_loss=True), gradient_exchange(wrapped)
    # The first step makes the optimizer's state, and finds the order of modules.
    for modes in ((), (live, handed)):
        batches = [random_batch(1, case.tokens, case.vocab, torch.Generator().manual_seed(seed)) for seed in range(PASSES)]
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            accumulate(executor, batches, scaler, ranks)
            work = live.peak
            exchange.clipped(loaded.trainable, 1.0)
            exchange.update(optimizer, scaler)
    held = alive()
    exchange.close()
    return {"held": held, "work": work, **handed.bytes}


CASES: dict[str, tuple[Case, Any]] = {
    "2, full": (FULL, TWO),
    "2 offloaded": (ADAPTERS, TWO_OFFLOADED),
    # It replaces torch's linear maps for good.
    "3 offloaded, full": (FULL, THREE_OFFLOADED),
    "3": (ADAPTERS, THREE),
}


def each(ranks: Ranks, _: Path) -> dict[str, dict[str, int]]:
    return {name: one(case, options, ranks) for name, (case, options) in CASES.items()}


def test_it_exchanges_and_holds_what_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "LAYERS", LAYERS)
    # As in a model of size, no map's gradient fits into the bucket, and none stays whole.
    monkeypatch.setattr(zero_2, "BUCKET", 2**15)
    monkeypatch.setattr(zero_3, "PERSISTENT", 128)
    for name, found in together(tmp_path, RANKS, each)[0].items():
        assert_as_planned(name, *CASES[name], found)


def assert_as_planned(name: str, case: Case, options: Any, found: dict[str, int]) -> None:
    plan = planned(case, options)
    words = f"{name}: {plan}, found {found}"
    gathered, scattered = found["allgather_base"], found.get("reduce_scatter_base", 0)
    handed = gathered + scattered + found["allreduce"]
    if isinstance(options, ZeRO3.Config):
        assert plan.exchange.handed_bytes - PASSES * STILL_THERE * plan.layer <= handed <= plan.exchange.handed_bytes, words
        assert not found["allreduce"] and plan.exchange.link_bytes == plan.exchange.handed_bytes / RANKS, words
    else:
        # Of a sum each rank sends 2(R − 1)/R, of what is gathered half as much.
        assert handed == plan.exchange.handed_bytes and gathered / 2 + found["allreduce"] == plan.exchange.link_bytes, words
    assert plan.held == pytest.approx(found["held"], rel=0.02), words
    if not options.offload_optimizer:
        assert 0.95 <= plan.peak / (found["held"] + found["work"]) <= 1.1, words


def test_what_two_gpus_measured_is_planned() -> None:
    """Llama-3.1-8B, all weights, in two GPUs' memory and the host's: at its peak the head's gradient leaves beside the head."""
    (row,) = (row for row in json.loads((MEASUREMENTS / "ranks.json").read_text())["runs"] if row["case"] == "zero3_llama8b")
    config = from_overrides("model=llama31_8b", *ZERO3, "hardware.gpus=2", "tier=tier1", f"tier.context={row['context']}").config
    model = shape(config.model)
    facts = Facts(model, replace(device("rtx3090"), count=2), row["context"], 1, model.total_params, "full")
    found = max(step["allocated_peak_bytes"] for step in row["steps"])
    assert predict(facts, decide(config.optimizations, facts)).total == pytest.approx(found, rel=0.03)
