"""Every optimization, whichever it is: it acts, it undoes, it keeps its class, its rules hold."""

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from elite.attention import DOCUMENT_EAGER
from elite.distributed.ranks import Ranks
from elite.errors import PlanError
from elite.executor.whole import WholeExecutor
from elite.facts import Device, Facts, LinearShape, ModelShape
from elite.model import LoadedModel, apply_stage
from elite.optimizations import ALL, OptimizationsConfig, decide
from elite.optimizations.contract import Decision, Estimate, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.targets import BatchLayout, GenerationBuild, LoopBuild, OptimizerBuild, Runtime
from elite.optimizations.torch_compile import Backend
from elite.training.live_bytes import LiveBytes
from elite.training.loop import Trainer
from elite.training.step import accumulate, make_scaler
from tests.models import tiny
from tests.test_attention import row
from tests.training.rig import TRAINING, adapted, fitted, loop_build, rig

CPU = Device("cpu", "cpu", True, 1, 2**34, 2**34, None, True, 1e11, 1e10, 1e10, 2**34, 2)
SHAPE = ModelShape(
    "tiny",
    "llama",
    2,
    32,
    64,
    4,
    2,
    8,
    97,
    2048,
    (
        LinearShape("self_attn.q_proj", 32, 32),
        LinearShape("self_attn.k_proj", 32, 16),
        LinearShape("self_attn.v_proj", 32, 16),
        LinearShape("self_attn.o_proj", 32, 32),
        LinearShape("mlp.up_proj", 32, 64),
        LinearShape("mlp.down_proj", 64, 32),
    ),
    9000,
    30000,
)
FACTS = Facts(SHAPE, CPU, 4096, 1, SHAPE.lora_params(128), "lora")
ALONE = Ranks(0, 1, torch.device("cpu"))
BY_NAME = {kind.name: kind for kind in ALL}
ON = OptimizationConfig(enabled=True)
NEEDS: dict[str, dict[str, Any]] = {
    "tiled_mlp": {"tile": 7},
    "gqa_conversion": {"kv_heads": 1},
    "sliding_window": {"window": 5},
    "torch_compile": {"backend": Backend.aot_eager},
    "activation_quantization": {"width": 8},
    "early_stopping": {"patience": 2},
    "loss_spike_detection": {"minimum": 4, "threshold": 50},
}
"""Options without which it would find nothing to do in models this small and runs this short."""
SHARED_BY_TWO = {"ring_attention"}
"""What one rank alone has no use for; tests/distributed/test_sharing.py holds its result to one rank's."""
CUDA_ONLY = {"backend_flags", "fused_kernels", "liger_kernels", "memory_pool", "defragmentation"}
SEVERAL_RANKS = {"power_sgd", "tensor_parallel", "zero_2", "zero_3"}
"""Acts on the exchange between ranks alone (tests/distributed/test_power_sgd.py, test_tensor_parallel.py, test_zero.py)."""
ELSEWHERE = CUDA_ONLY | SEVERAL_RANKS


def on(kind: type[Optimization]) -> OptimizationConfig:
    return kind.Config(enabled=True, **NEEDS.get(kind.name, {}))


def only(name: str) -> tuple[Decision, ...]:
    changes: dict[str, Any] = {name: on(BY_NAME[name])}
    ranks = 2 if name in SHARED_BY_TWO else 1
    return decide(replace(OptimizationsConfig(), **changes), replace(FACTS, device=replace(CPU, count=ranks), sharing=ranks))


def needs_adapters(name: str) -> bool:
    kind = BY_NAME[name]
    return kind.stage in (Stage.executor, Stage.optimizer) and kind(on(kind)).check(replace(FACTS, adapter="full")) is not None


def target(stage: Stage, kind: str, adapters: bool = False) -> Any:
    model = tiny(kind, DOCUMENT_EAGER, hidden_size=64)
    if adapters:
        get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        # Adapters alone would need many steps for a loss that moves.
        model.get_output_embeddings().requires_grad_(True)
    if stage is Stage.data:
        return BatchLayout()
    if stage is Stage.runtime:
        return Runtime(supports_bf16=True)
    if stage is Stage.generation:
        return GenerationBuild()
    if stage is Stage.optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return OptimizerBuild([{"params": trained, "weight_decay": 0.0}], {"lr": 1e-3}, model=model)
    if stage is Stage.loop:
        loaded = LoadedModel(model, model, {})
        return loop_build(loaded, torch.optim.AdamW(loaded.trainable), steps=10, validations=10)
    return model


def state(thing: Any) -> Any:
    """Everything an `apply` may touch, comparable."""
    if isinstance(thing, PreTrainedModel):
        patched = {name: sorted(vars(module)) for name, module in thing.named_modules()}
        return patched, thing.config._attn_implementation, {name: p.detach().clone() for name, p in thing.named_parameters()}
    if isinstance(thing, LoopBuild):
        values = {str(i): parameter.detach().clone() for i, parameter in enumerate(thing.parameters)}
        return list(thing.hooks), dict(vars(thing.executor)), values
    return dict(vars(thing))


def same(one: Any, two: Any) -> bool:
    if isinstance(one, tuple):
        return one[:2] == two[:2] and all(torch.equal(one[2][name], two[2][name]) for name in one[2] | two[2])
    return bool(one == two)


@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - ELSEWHERE))
def test_it_acts_and_undoes(name: str, kind: str) -> None:
    stage = BY_NAME[name].stage
    thing = target(stage, kind, needs_adapters(name))
    before = state(thing)
    applied = apply_stage(stage, only(name), thing)[name]
    assert applied.count > 0
    if applied.undo is None:
        pytest.skip(f"{name} keeps no original to go back to")
    assert not same(state(thing), before), "nothing changed"
    applied.undo()
    assert same(state(thing), before)


def test_an_optimization_without_anything_to_act_on_is_an_error() -> None:
    with pytest.raises(PlanError, match="found nothing to act on"):
        apply_stage(Stage.optimizer, only("adamw_8bit"), OptimizerBuild([{"params": [torch.nn.Parameter(torch.zeros(3))]}]))


@cache
def curve(*names: str, adapters: bool = False, steps: int = 50) -> tuple[float, ...]:
    """Training losses of a tiny model with these optimizations on."""
    decisions = [decision for name in names for decision in only(name) if decision.active]
    model = target(Stage.model, "llama", adapters)
    for stage in (Stage.model, Stage.executor):
        apply_stage(stage, tuple(decisions), model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2 if adapters else 3e-3)
    executor, losses = WholeExecutor(model, torch.float32, "fused_loss" in names), []
    for step in range(steps):
        losses.append(accumulate(executor, [row(13, 24, seed=step % 8)], make_scaler(ALONE.device, torch.float32), ALONE))
        optimizer.step()
        optimizer.zero_grad()
    return tuple(losses)


KEEPING = [kind.name for kind in ALL if kind.stage in (Stage.model, Stage.executor) and kind.exactness is not Exactness.APPROX]
LOOP = [kind.name for kind in ALL if kind.stage is Stage.loop and kind.name not in ELSEWHERE]


@pytest.mark.parametrize("name", [name for name in KEEPING if name not in ELSEWHERE])
def test_exact_and_equal_keep_their_word_in_fp32(name: str) -> None:
    adapters = needs_adapters(name)
    plain, changed = torch.tensor(curve(adapters=adapters)), torch.tensor(curve(name, adapters=adapters))
    difference = changed - plain
    assert plain[-1] < plain[0] - 0.3, "the curve must move to mean anything"
    assert difference.abs().max() <= 1e-3
    assert difference.mean().abs() <= 1e-5


def looped(folder: Path, *names: str, kind: str = "llama", steps: int = 50) -> tuple[Trainer, torch.Tensor]:
    """A real run of adapters on a tiny model, and its training losses."""
    decisions = [decision for name in names for decision in only(name) if decision.active]
    trainer = rig(folder, decisions, steps, kind, training=replace(TRAINING, val_every=10))
    return trainer, torch.tensor([line["loss"] for line in fitted(trainer).steps])


Undisturbed = Callable[[str, int], tuple[Trainer, torch.Tensor]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Runs without any optimization, by the model's kind and the steps: each is what several are held against."""
    return cache(lambda kind, steps: looped(tmp_path_factory.mktemp("plain"), kind=kind, steps=steps))


@pytest.mark.parametrize("name", [name for name in LOOP if BY_NAME[name].exactness is not Exactness.APPROX])
def test_what_is_exact_in_the_loop_keeps_its_word(name: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    _, plain = undisturbed("llama", 50)
    trainer, changed = looped(tmp_path, name)
    assert plain[-1] < plain[0] - 0.3, "the curve must move to mean anything"
    # The run may be shorter; what it does is the same to the last bit.
    assert torch.equal(changed, plain[: len(changed)]) and len(changed) >= 10
    assert any(trainer.hooks[0].counts().values())


@pytest.mark.parametrize("kind", ["llama", "phi"])
@pytest.mark.parametrize("name", [name for name in LOOP if BY_NAME[name].exactness is Exactness.APPROX])
def test_what_is_approximate_in_the_loop_acts(name: str, kind: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    plain, without = undisturbed(kind, 8)
    trainer, losses = looped(tmp_path, name, kind=kind, steps=8)
    effect = trainer.progress.last_val["val_loss"] - plain.progress.last_val["val_loss"]
    print(f"{name} on {kind}: validation loss {effect:+.4f} after 8 steps")
    assert effect != 0 and math.isfinite(effect)
    assert torch.equal(losses, without) == (Site.EVALUATED_WEIGHTS in BY_NAME[name].claims)
    for hook in trainer.hooks:
        assert hook.counts() and all(hook.counts().values())


TINY = replace(
    SHAPE,
    hidden_size=64,
    head_dim=16,
    layer_linears=(
        *(LinearShape(f"self_attn.{part}_proj", 64, out) for part, out in (("q", 64), ("k", 32), ("v", 32), ("o", 64))),
        *(LinearShape(f"mlp.{part}_proj", 64, 64) for part in ("gate", "up", "down")),
    ),
)


@pytest.mark.parametrize("name", LOOP)
def test_memory_in_the_loop_is_what_it_says(name: str) -> None:
    loaded = adapted("llama")
    facts = replace(FACTS, model=TINY, trainable_params=sum(p.numel() for p in loaded.trainable))
    assert facts.trainable_params == TINY.lora_params(4)
    thing, nothing = loop_build(loaded, torch.optim.AdamW(loaded.trainable), 10, 10), Step(Estimate())
    said = BY_NAME[name](on(BY_NAME[name])).memory(nothing, facts)
    live = LiveBytes()
    live.ignore(loaded.model.parameters())
    with live:
        apply_stage(Stage.loop, only(name), thing)
    # Counters take a few bytes.
    assert live.current == pytest.approx(said.standing.total, abs=64)
    for parameter in loaded.trainable:
        parameter.grad = torch.ones_like(parameter)
    update = LiveBytes()
    update.ignore([tensor for p in loaded.trainable for tensor in (p, p.grad) if tensor is not None])
    with update:
        for hook in thing.hooks:
            hook.gradients(loaded.trainable, 1)
    assert update.peak == pytest.approx(said.optimizer_workspace, abs=6 * 64 * 4), "a few values a row at most"


def test_mixed_precision_keeps_its_word_in_bf16() -> None:
    def losses(dtype: torch.dtype) -> torch.Tensor:
        model = target(Stage.model, "llama")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        executor, seen = WholeExecutor(model, dtype), []
        for step in range(50):
            seen.append(accumulate(executor, [row(13, 24, seed=step % 8)], make_scaler(ALONE.device, dtype), ALONE))
            optimizer.step()
            optimizer.zero_grad()
        return torch.tensor(seen)

    difference = losses(torch.bfloat16) - losses(torch.float32)
    assert 0 < difference.abs().max() <= 1.5e-2
    assert difference.mean().abs() <= 1e-3


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_it_declares_itself(kind: type[Optimization]) -> None:
    module = inspect.getmodule(kind)
    assert module is not None and module.__doc__ is not None
    for word in ("What:", "How:", "Memory:", "Source:"):
        assert word in module.__doc__
    assert module.__name__ == f"elite.optimizations.{kind.name}"
    assert kind.claims and kind.title and kind.source
    assert isinstance(getattr(OptimizationsConfig(), kind.name), kind.Config)


def test_rows_and_names_are_unique() -> None:
    assert len({kind.row for kind in ALL}) == len(BY_NAME) == len(ALL)


def test_two_claims_on_one_site_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BY_NAME["qlora"], "claims", BY_NAME["flash_attention"].claims)
    with pytest.raises(PlanError, match="flash_attention and optimizations.qlora both decide the attention kernel"):
        decide(replace(OptimizationsConfig(), qlora=ON, flash_attention=ON), FACTS)


def test_an_inactive_one_says_why() -> None:
    decisions = {d.name: d for d in decide(replace(OptimizationsConfig(), qlora=ON), replace(FACTS, adapter="full"))}
    assert not decisions["qlora"].active and "adapter.method=lora" in decisions["qlora"].reason
    no_bf16 = replace(FACTS, device=replace(CPU, supports_bf16=False))
    decisions = {d.name: d for d in decide(replace(OptimizationsConfig(), mixed_precision=ON), no_bf16)}
    assert not decisions["mixed_precision"].active and "bf16" in decisions["mixed_precision"].reason


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_nothing_grows_but_copies_of_what_is_trained_and_a_mask(kind: type[Optimization]) -> None:
    everything = Step(Estimate(**dict.fromkeys(Estimate().by_component(), 1000000000.0)), optimizer_workspace=1e9)
    # On one rank ZeRO-3 is refused: what its step copies is the half of two at most.
    made = kind(on(kind)).memory(everything, replace(FACTS, device=replace(FACTS.device, count=2)) if kind.name == "zero_3" else FACTS)
    assert replace(made.standing, trainable_copy=0.0, batch=0.0).total <= replace(everything.standing, trainable_copy=0.0, batch=0.0).total
    assert made.standing.batch == everything.standing.batch or kind.name == "sliding_window"
    assert made.standing.trainable_copy <= everything.standing.trainable_copy + 2 * FACTS.trainable_params * everything.value
    assert made.optimizer_workspace <= everything.optimizer_workspace
    assert made.value <= everything.value and made.hidden <= everything.hidden


def test_all_off_is_none() -> None:
    assert not any(decision.active for decision in decide(OptimizationsConfig(), FACTS))
