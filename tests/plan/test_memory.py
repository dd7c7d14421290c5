"""The memory formulas against what small real models really hold."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from elite import geometry
from elite.attention import DOCUMENT_SDPA
from elite.compose import from_overrides
from elite.config import ModelConfig
from elite.facts import Facts
from elite.model import apply_stage
from elite.optimizations import decide
from elite.optimizations.contract import Estimate, Stage
from elite.optimizations.flash_attention import log_sum_exp_bytes
from elite.optimizations.fused_loss import FusedLoss
from elite.optimizations.gradient_checkpointing import GradientCheckpointing
from elite.optimizations.qlora import BLOCK, SCALE_BLOCK, QLoRA, dequantised_bytes, packed_bytes
from elite.optimizations.tiled_mlp import TiledMLP
from elite.plan.batch import facts_of
from elite.plan.memory import folded, host, predict, unoptimized
from elite.report.measurement import MEASUREMENTS
from tests.plan.helpers import STANDARD, device, phi2, switches
from tests.plan.live_bytes import LiveBytes, SavedBytes

RANK = 8
TILED: dict[str, Any] = {"fused_loss": FusedLoss, "tiled_mlp": TiledMLP}
LAYERS = 3


def small(kind: str, width: int, vocab: int = 128) -> ModelConfig:
    """A model of `width`, four heads; llama has two key/value heads."""
    rope = {"rope_type": "default", "rope_theta": 1e4} | ({"partial_rotary_factor": 0.5} if kind == "phi" else {})
    return ModelConfig(
        name=kind,
        model_type=kind,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2 if kind == "llama" else 4,
        vocab_size=vocab,
        max_position_embeddings=1024,
        rope_parameters=rope,
    )


def adapted(config: ModelConfig, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    core = AutoModelForCausalLM.from_config(geometry.hf_config(config), attn_implementation=attention)
    core.config.use_cache = False
    return get_peft_model(core, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")).train()


def facts_for(config: ModelConfig, context: int) -> Facts:
    shape = geometry.shape(config)
    return Facts(shape, device("cpu"), context, 1, shape.lora_params(RANK), "lora")


def loss(model: Any, ids: torch.Tensor, half: bool = False, fused: bool = False) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        if fused:
            summed: torch.Tensor = model(input_ids=ids, use_cache=False, labels_to_sum=ids, documents=((ids.shape[1],),))
            return summed
        logits = model(input_ids=ids, use_cache=False, documents=((ids.shape[1],),)).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="sum")


def live_bytes(estimate: Estimate) -> float:
    """What a pass itself holds, beyond weights, gradients and the batch."""
    return (
        estimate.saved_activations
        + estimate.layer_inputs
        + estimate.attention_scores
        + estimate.layer_workspace
        + estimate.mlp_workspace
        + estimate.loss_workspace
    )


def tensors(model: Any) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("width", "context"), [(64, 128), (128, 256)])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_saved_activations_are_what_autograd_saves(kind: str, width: int, context: int, attention: str) -> None:
    config = small(kind, width)
    model = adapted(config, attention)
    saved = SavedBytes(tensors(model))
    with saved.hooks:
        model.get_base_model().get_decoder()(input_ids=torch.randint(0, 128, (1, context)), use_cache=False)
    facts = facts_for(config, context)
    on = ("flash_attention",) if attention == "sdpa" else ()
    estimate = folded(facts, decide(switches(*on), facts))
    assert estimate.saved_activations + estimate.attention_scores == pytest.approx(saved.total, rel=0.15)


def halve(model: Any) -> None:
    """Frozen weights in bf16, adapters in fp32 without a cast of their input, as a run has them."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def measured_peak(model: Any, ids: torch.Tensor, half: bool, fused: bool = False) -> int:
    """Bytes alive at once in a forward and backward pass, beyond weights, gradients and the batch."""
    loss(model, ids, half, fused).backward()  # gradients exist from now on
    live = LiveBytes()
    live.ignore([*tensors(model), *(p.grad for p in model.parameters() if p.grad is not None), ids])
    with live:
        loss(model, ids, half, fused).backward()
    return live.peak


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("vocab", "at_loss"), [(32, False), (4096, True)])
@pytest.mark.parametrize(("width", "context", "half"), [(64, 256, False), (128, 512, False), (64, 256, True)])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_predicted_peak_is_the_measured_one(
    kind: str, width: int, context: int, vocab: int, at_loss: bool, half: bool, checkpointed: bool
) -> None:
    config = small(kind, width, vocab)
    model = adapted(config)
    if half:
        halve(model)
    if checkpointed:
        GradientCheckpointing(GradientCheckpointing.Config(enabled=True)).apply(model.get_base_model())
    peak = measured_peak(model, torch.randint(0, vocab, (1, context)), half)
    facts = replace(facts_for(config, context), device=replace(device("cpu"), supports_bf16=True))
    on = ["flash_attention"] + ["mixed_precision"] * half + ["gradient_checkpointing"] * checkpointed
    estimate = predict(facts, decide(switches(*on), facts))
    predicted = live_bytes(estimate)
    assert (estimate.loss_workspace > 0) == at_loss
    assert 0.85 <= peak / predicted <= (1.05 if at_loss else 1.15)


TILE = 64


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    ("names", "vocab"),
    [(("fused_loss",), 16384), (("tiled_mlp",), 32), (("fused_loss", "tiled_mlp"), 4096)],
)
@pytest.mark.parametrize(("width", "half"), [(64, False), (128, False), (64, True)])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_predicted_peak_in_tiles(kind: str, width: int, half: bool, names: tuple[str, ...], vocab: int, checkpointed: bool) -> None:
    context, config = 512, small(kind, width, vocab)
    model = adapted(config, DOCUMENT_SDPA)
    if half:
        halve(model)
    on: dict[str, Any] = {name: TILED[name].Config(enabled=True, tile=TILE) for name in names}
    if checkpointed:
        on["gradient_checkpointing"] = GradientCheckpointing.Config(enabled=True)
    facts = replace(facts_for(config, context), device=replace(device("cpu"), supports_bf16=True))
    decisions = decide(replace(switches("flash_attention", *["mixed_precision"] * half), **on), facts)
    apply_stage(Stage.executor, decisions, model.get_base_model())
    peak = measured_peak(model, torch.randint(0, vocab, (1, context)), half, "fused_loss" in names)
    estimate = predict(facts, decisions)
    assert 0.85 <= peak / live_bytes(estimate) <= 1.15


def test_pinned_memory_of_offload_is_what_runs_took() -> None:
    """Whole runs of the calibration grid on a GPU: torch's allocator locks a power of two for each layer's input."""
    content = json.loads((MEASUREMENTS / "calibration.json").read_text())
    ran = [run for run in content["runs"] if run["outcome"] == "ran" and run["executor"] == "whole"]
    seen = set()
    for run in ran:
        config = from_overrides(*run["overrides"]).config
        facts = replace(facts_of(config, device("h100"), geometry.shape(config.model)), context=config.tier.context)
        planned = host(facts, decide(config.optimizations, facts))
        # The bench itself locks a few bytes.
        assert planned == pytest.approx(run["measured"]["host_pinned_bytes"], abs=64)
        seen.add(planned > 0)
    assert seen == {True, False}


def test_offloaded_inputs_leave_the_device() -> None:
    facts = facts_phi2(32768)
    here, there = (
        folded(facts, decide(switches("mixed_precision", name), facts)) for name in ("gradient_checkpointing", "checkpoint_offload")
    )
    one = 2 * facts.context * facts.model.hidden_size
    assert (here.layer_inputs, there.layer_inputs) == (32 * one, 2 * one)
    assert replace(there, layer_inputs=here.layer_inputs) == here
    cpu = replace(facts, device=device("cpu"))
    assert folded(cpu, decide(switches("checkpoint_offload"), cpu)) == folded(cpu, decide(switches("gradient_checkpointing"), cpu))


def test_adamw_state_is_eight_bytes_a_parameter() -> None:
    parameters = [torch.nn.Parameter(torch.randn(64, 256)) for _ in range(4)]
    state = _state_bytes(torch.optim.AdamW(parameters), parameters)
    facts = replace(facts_for(small("llama", 64), 128), trainable_params=4 * 64 * 256)
    assert unoptimized(facts).optimizer_state == state


def test_adamw_8bit_state_is_as_estimated() -> None:
    parameters = [torch.nn.Parameter(torch.randn(64, 256)) for _ in range(4)]
    state = _state_bytes(bitsandbytes.optim.AdamW8bit(parameters), parameters)
    facts = replace(facts_for(small("llama", 64), 128), trainable_params=4 * 64 * 256)
    assert folded(facts, decide(switches("adamw_8bit"), facts)).optimizer_state == pytest.approx(state, rel=0.05)


def _state_bytes(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> int:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    # The code book of the 8-bit format is one table for all parameters, the step counter a scalar.
    return sum(
        value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.ndim and not name.startswith("qmap")
    )


def test_qlora_weights_are_as_estimated() -> None:
    config = small("llama", 256)
    core = AutoModelForCausalLM.from_config(geometry.hf_config(config))
    QLoRA(QLoRA.Config(enabled=True)).apply(core)
    total = 0
    for module in core.get_decoder().layers.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            packed: Any = module.to("cpu").weight
            state = packed.quant_state
            total += packed.numel() + state.absmax.nbytes + state.state2.absmax.nbytes
    facts = facts_for(config, 128)
    assert folded(facts, decide(switches("qlora"), facts)).linear_weights == pytest.approx(total, rel=0.02)


def facts_phi2(context: int = 4096) -> Facts:
    shape = phi2()
    return Facts(shape, device("rtx3090"), context, 1, shape.lora_params(16), "lora")


def test_memory_grows_with_the_context() -> None:
    totals = [predict(f, decide(switches(*STANDARD), f)).total for f in (facts_phi2(4096 * 2**n) for n in range(11))]
    assert all(b > a for a, b in pairwise(totals))


@pytest.mark.parametrize("name", ["qlora", "gradient_checkpointing", "checkpoint_offload", "flash_attention", "adamw_8bit"])
@pytest.mark.parametrize("others", [(), ("mixed_precision", "flash_attention")])
def test_memory_shrinks_with_each_optimization(name: str, others: tuple[str, ...]) -> None:
    facts = facts_phi2()
    without = tuple(other for other in others if other != name)
    assert predict(facts, decide(switches(*without, name), facts)).total < predict(facts, decide(switches(*without), facts)).total


def test_the_fused_loss_takes_the_peak_from_the_loss() -> None:
    """Phi-2 at 4K with checkpointed layers: 2.4 GiB of logits before, at most 512 MiB of them after."""
    facts = facts_phi2()
    before, after = (predict(facts, decide(switches(*STANDARD, *extra), facts)) for extra in ((), ("fused_loss",)))
    assert before.loss_workspace == 12 * facts.context * facts.model.vocab_size
    assert after.total < before.total - 1.25 * 2**30
    folded_loss = folded(facts, decide(switches(*STANDARD, "fused_loss"), facts)).loss_workspace
    assert folded_loss <= 512 * 2**20 + 2 * facts.context * facts.model.hidden_size


def test_frozen_weights_are_halved_and_packed() -> None:
    facts = facts_phi2()
    half = folded(facts, decide(switches("mixed_precision"), facts))
    assert half.linear_weights + half.other_weights == 2 * facts.model.total_params
    assert half.trainable_copy == 4 * facts.trainable_params


def test_full_fine_tuning_trains_the_weights_themselves() -> None:
    shape = phi2()
    facts = Facts(shape, device("h100"), 4096, 1, shape.total_params, "full")
    estimate = unoptimized(facts)
    assert estimate.trainable_copy == 0
    assert estimate.gradients == 4 * shape.total_params
    assert estimate.optimizer_state == 8 * shape.total_params


def test_several_gpus_keep_gradients_twice() -> None:
    one = facts_phi2()
    two = replace(one, device=replace(one.device, count=2))
    assert unoptimized(two).gradients == 2 * unoptimized(one).gradients


def test_layer_workspace_is_two_hidden_states() -> None:
    facts = facts_phi2()
    assert unoptimized(facts).layer_workspace == 4 * 2 * facts.context * facts.model.hidden_size
    assert unoptimized(facts).mlp_workspace == 4 * 2 * facts.context * 10240


def test_fused_attention_keeps_a_log_sum_exp_and_no_scores() -> None:
    heads, keys, tokens, width = 4, 4, 96, 16
    query, key, value = (torch.randn(1, n, tokens, width, requires_grad=True) for n in (heads, keys, keys))
    saved = SavedBytes([])
    with saved.hooks:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    facts = facts_for(small("phi", heads * width), tokens)
    beside = log_sum_exp_bytes(facts) / facts.model.num_hidden_layers
    assert saved.total == sum(t.nbytes for t in (query, key, value, out)) + beside
    estimates = [folded(facts, decide(switches(*on), facts)) for on in ((), ("flash_attention",))]
    assert [bool(estimate.attention_scores) for estimate in estimates] == [True, False]


@pytest.mark.parametrize("shape", [(64, 64), (256, 1024), (96, 160)])
def test_packed_weights_are_as_bitsandbytes_packs_them(shape: tuple[int, int]) -> None:
    packed, state = bitsandbytes.functional.quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True, blocksize=BLOCK)
    held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert packed_bytes(shape[0] * shape[1]) == pytest.approx(held, rel=0.02)
    assert state.state2.blocksize == SCALE_BLOCK
    facts = facts_phi2()
    assert dequantised_bytes(facts, 2) == 2 * 2560 * 10240
