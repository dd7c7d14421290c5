"""The memory formulas against what small real models really hold."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from elite import geometry
from elite.compose import from_overrides
from elite.config import CONF_DIR, TrainingConfig
from elite.facts import Facts
from elite.optimizations import decide
from elite.optimizations.flash_attention import log_sum_exp_bytes
from elite.optimizations.parts import unpacked
from elite.optimizations.qlora import BLOCK, SCALE_BLOCK, QLoRA, dequantised_bytes, packed_bytes
from elite.plan import batch
from elite.plan.memory import folded, host, layer_parts, moments, predict, unoptimized
from elite.report.measurement import MEASUREMENTS
from elite.training.optimizer import build_optimizer
from tests.kernels.interpreter import run_interpreted
from tests.plan.cases import CHECKPOINTED, FLASH, FUSED, HALF, MORE_FUSED, PLAIN
from tests.plan.helpers import STANDARD, device, model_config, phi2, switches
from tests.plan.live_bytes import LiveBytes, SavedBytes
from tests.plan.steps import Case, as_on_cuda, built, decisions_of, facts_of, measured_peak, passing, small, tensors

RANK = 8


def check_peak(case: Case) -> None:
    """The predicted peak is within 3 % of the measured one."""
    facts = facts_of(case)
    decisions = decisions_of(case, facts)
    estimate = passing(case, facts, decisions)
    peak = measured_peak(case, built(case, decisions))
    shown = {name: round(value) for name, value in estimate.by_component().items() if value}
    assert estimate.total == pytest.approx(peak, rel=0.03), f"{case}: {shown}"


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_the_predicted_peak_is_the_measured_one(case: Case) -> None:
    check_peak(case)


@pytest.mark.parametrize("more", [("fused_lora",), ()], ids="+".join)
def test_gradients_are_converted_while_what_was_saved_is_still_there(more: tuple[str, ...]) -> None:
    """Where nothing is recomputed: 2 bytes a value of Phi's MLP, its activation written out."""
    case = Case("phi", (*HALF, "fused_loss", *more), cuda=True)
    facts = facts_of(case)
    decisions = decisions_of(case, facts)
    estimate = passing(case, facts, decisions)
    assert estimate.total == pytest.approx(measured_peak(case, built(case, decisions)), rel=0.005)


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_attentions_gradient_waits_beside_a_parallel_mlp(dropout: float) -> None:
    """Where the stream is fp32, as embeddings are trained: 2 bytes a value."""
    case = Case("phi", CHECKPOINTED, cuda=True, full=True, dropout=dropout)
    facts = facts_of(case)
    decisions = decisions_of(case, facts)
    peak = measured_peak(case, built(case, decisions))
    if dropout:
        # A mask has its values' dtype on a CPU, and bytes on a GPU.
        peak -= case.tokens * case.width
    assert passing(case, facts, decisions).total == pytest.approx(peak, rel=0.002)


def check_fused_peaks(_device: str) -> None:
    """In a process of its own, where Triton interprets."""
    for case in FUSED:
        check_peak(case)


def check_more_fused_peaks(_device: str) -> None:
    for case in MORE_FUSED:
        check_peak(case)


@pytest.mark.parametrize("check", [check_fused_peaks, pytest.param(check_more_fused_peaks, marks=pytest.mark.slow)])
def test_the_predicted_peak_is_the_measured_one_with_fused_kernels(check: Callable[[str], None]) -> None:
    run_interpreted(__name__, check.__name__)


def test_recorded_steps_took_what_is_predicted() -> None:
    """Whole steps of real models: allocated bytes, within 3 %."""
    recorded = json.loads((CONF_DIR.parent / "docs" / "measurements" / "fused_steps.json").read_text())
    runs = [run for run in recorded["runs"] if "planned" in run]
    assert runs
    for run in runs:
        shape = geometry.shape(model_config(run["model"]["name"]))
        rank = int(run["model"]["adapter"].split()[-1])
        facts = Facts(shape, device("h100"), run["context"], run["micro_batch"], shape.lora_params(rank), "lora")
        peak = max(step["allocated_peak_bytes"] for step in run["steps"])
        assert predict(facts, decide(switches(*run["active"]), facts)).total == pytest.approx(peak, rel=0.03), run["name"]


@pytest.mark.parametrize("on", [(), FLASH, HALF, (*HALF, "fused_lora")], ids="+".join)
@pytest.mark.parametrize(("width", "tokens"), [(64, 128), (128, 256)])
@pytest.mark.parametrize("kind", ["llama", "phi", "gemma"])
def test_each_module_saves_what_its_parts_say(kind: str, width: int, tokens: int, on: tuple[str, ...]) -> None:
    """The last layer's norms, attention and MLP, one by one."""
    # In fp32 a GPU would expand shared heads first.
    case = Case(kind, on, cuda="mixed_precision" in on, width=width, tokens=tokens)
    facts = facts_of(case)
    decisions = decisions_of(case, facts)
    parts = layer_parts(folded(facts, decisions), facts, tokens)
    predicted = defaultdict[str, float](float)
    for part in parts:
        predicted["norm" if part.name == "norm" else "mlp" if part.wide else "self_attn"] += part.saved
    found = _saved_by_module(case, built(case, decisions))
    for name in ("norm", "self_attn", "mlp"):
        assert predicted[name] == pytest.approx(found[name], rel=0.03), name


def _saved_by_module(case: Case, model: Any) -> dict[str, int]:
    """Bytes that the last layer's modules save of what no module before them has saved."""
    layer = model.get_decoder().layers[-1] if case.full else model.get_base_model().get_decoder().layers[-1]
    saved, found, before = SavedBytes(tensors(model)), defaultdict[str, int](int), list[int]()
    with as_on_cuda(), saved.hooks, torch.autocast("cpu", torch.bfloat16, enabled=case.half):
        for name, module in layer.named_children():
            kind = "norm" if name.endswith("norm") else name
            module.register_forward_pre_hook(lambda *_: before.append(saved.total))
            module.register_forward_hook(lambda *_, kind=kind: found.update({kind: found[kind] + saved.total - before.pop()}))
        ids = torch.randint(0, case.vocab, (1, case.tokens))
        model.get_base_model().get_decoder()(input_ids=ids, use_cache=False, documents=((case.tokens,),))
    return found


def facts_for(config: Any, context: int) -> Facts:
    shape = geometry.shape(config)
    return Facts(shape, device("cpu"), context, 1, shape.lora_params(RANK), "lora")


def test_the_update_holds_what_it_is_said_to() -> None:
    """All second moments' square roots at once, as AdamW computes on CUDA, or one tensor's after another's, as on a CPU."""
    for together in (True, False):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(rows, 256)) for rows in (256, 1024, 1024)]
        optimizer, _ = build_optimizer(parameters, 1e-4, TrainingConfig(), ())
        for group in optimizer.param_groups:
            # What torch itself chooses for tensors on CUDA.
            group["foreach"] = together
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            live = LiveBytes()
            live.ignore([t for p in parameters for t in (p, p.grad, *optimizer.state[p].values()) if isinstance(t, torch.Tensor)])
            with live:
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
        values = sum(p.numel() for p in parameters) if together else 3 * parameters[-1].numel()
        assert live.peak == pytest.approx(4 * values, rel=0.03)


def test_the_update_is_the_peak_of_full_fine_tuning_on_few_tokens() -> None:
    """Weights, gradients, two moments and their square roots: 20 bytes a parameter."""
    shape = phi2()
    facts = Facts(shape, device("h100"), 64, 1, shape.total_params, "full")
    estimate = predict(facts, decide(switches(*STANDARD), facts))
    assert estimate.optimizer_workspace == 4 * shape.total_params
    assert estimate.total == pytest.approx(20 * shape.total_params, rel=0.01)
    eight_bit = predict(facts, decide(switches(*STANDARD, "adamw_8bit"), facts))
    assert eight_bit.optimizer_workspace == 0 and eight_bit.total < 14 * shape.total_params


def test_gradients_of_a_window_are_there_before_its_last_pass() -> None:
    """With several passes a step, gradients of all weights meet the logits."""
    shape = phi2()
    facts = Facts(shape, device("h100"), 8192, 1, shape.total_params, "full")
    step = folded(facts, decide(switches(*STANDARD), facts))
    once, often = (max(m.total for m in moments(step, replace(facts, accumulation=n)) if m.loss_workspace) for n in (1, 4))
    assert often - once == pytest.approx(4 * (shape.total_params - shape.vocab_size * shape.hidden_size), rel=0.15)


def test_pinned_memory_of_offload_is_what_runs_took() -> None:
    """Whole runs of the calibration grid on a GPU: torch's allocator locks a power of two for each layer's input."""
    content = json.loads((MEASUREMENTS / "calibration.json").read_text())
    ran = [run for run in content["runs"] if run["outcome"] == "ran" and run["executor"] == "whole"]
    seen = set()
    for run in ran:
        config = from_overrides(*run["overrides"]).config
        facts = replace(batch.facts_of(config, device("h100"), geometry.shape(config.model)), context=config.tier.context)
        planned = host(facts, decide(config.optimizations, facts))
        # The bench itself locks a few bytes.
        assert planned == pytest.approx(run["measured"]["host_pinned_bytes"], abs=64)
        seen.add(planned > 0)
    assert seen == {True, False}


@pytest.mark.parametrize(("more", "at_once"), [((), 1), (("fused_kernels",), 2)], ids=["eager", "fused"])
def test_offloaded_inputs_leave_the_device(more: tuple[str, ...], at_once: int) -> None:
    """But for the one that comes next, and a layer's own as long as its norm keeps it: an eager one keeps a copy in fp32."""
    facts = facts_phi2(32768)
    here, there = (
        predict(facts, decide(switches(*HALF, "fused_loss", *more, name), facts))
        for name in ("gradient_checkpointing", "checkpoint_offload")
    )
    one = 2 * facts.context * facts.model.hidden_size
    assert (here.layer_inputs, there.layer_inputs) == (32 * one, at_once * one)
    # What takes most is then a low layer, beside gradients of those above it.
    assert here.gradients == 0 < there.gradients
    assert replace(there, layer_inputs=here.layer_inputs, gradients=0.0) == here
    cpu = replace(facts, device=device("cpu"))
    assert folded(cpu, decide(switches("checkpoint_offload"), cpu)) == folded(cpu, decide(switches("gradient_checkpointing"), cpu))


def test_adamw_state_is_eight_bytes_a_parameter() -> None:
    parameters = [torch.nn.Parameter(torch.randn(64, 256)) for _ in range(4)]
    state = _state_bytes(torch.optim.AdamW(parameters), parameters)
    facts = replace(facts_for(small("llama", 64), 128), trainable_params=4 * 64 * 256)
    assert unoptimized(facts).standing.optimizer_state == state


@pytest.mark.parametrize("rank", [64, 40, 16])
def test_adamw_8bit_state_is_as_estimated(rank: int) -> None:
    shape = geometry.shape(small("llama", 64))
    widths = [width for linear in shape.layer_linears for width in (linear.inputs, linear.outputs)] * shape.num_hidden_layers
    # Of the least rank no tensor is large enough, of the next one some are.
    parameters = [torch.nn.Parameter(torch.randn(rank, width)) for width in widths]
    state = _state_bytes(bitsandbytes.optim.AdamW8bit(parameters), parameters)
    facts = replace(facts_for(small("llama", 64), 128), trainable_params=shape.lora_params(rank))
    (decision,) = (d for d in decide(switches("adamw_8bit"), facts) if d.requested)
    assert decision.active is (rank > 16)
    assert folded(facts, [decision]).standing.optimizer_state == pytest.approx(state, rel=0.02)


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
    assert folded(facts, decide(switches("qlora"), facts)).standing.linear_weights == pytest.approx(total, rel=0.02)


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
    assert after.total < before.total - 2**30
    assert after.loss_workspace == 0


def test_frozen_weights_are_halved_and_packed() -> None:
    facts = facts_phi2()
    half = folded(facts, decide(switches("mixed_precision"), facts)).standing
    assert half.linear_weights + half.other_weights == 2 * facts.model.total_params
    assert half.trainable_copy == 4 * facts.trainable_params


def test_full_fine_tuning_trains_the_weights_themselves() -> None:
    shape = phi2()
    facts = Facts(shape, device("h100"), 4096, 1, shape.total_params, "full")
    estimate = unoptimized(facts).standing
    assert estimate.trainable_copy == 0
    assert estimate.gradients == 4 * shape.total_params
    assert estimate.optimizer_state == 8 * shape.total_params


def test_several_gpus_keep_gradients_twice_where_passes_add_them_up() -> None:
    one = facts_phi2()
    two = replace(one, device=replace(one.device, count=2))
    for accumulation, times in ((1, 1), (4, 2)):
        step = unoptimized(replace(two, accumulation=accumulation))
        assert step.standing.gradients == times * unoptimized(one).standing.gradients
        # In the only pass there is room for them before they are made.
        assert step.gradients_stand == (accumulation == 1)


def test_fused_attention_keeps_a_log_sum_exp_and_no_scores() -> None:
    heads, keys, tokens, width = 4, 4, 96, 16
    query, key, value = (torch.randn(1, n, tokens, width, requires_grad=True) for n in (heads, keys, keys))
    saved = SavedBytes([])
    with saved.hooks:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert saved.total == sum(t.nbytes for t in (query, key, value, out)) + log_sum_exp_bytes(heads, tokens)
    facts = facts_for(small("phi", heads * width), tokens)
    steps = [folded(facts, decide(switches(*on), facts)) for on in ((), ("flash_attention",))]
    assert [any(part.scores for part in layer_parts(step, facts, tokens)) for step in steps] == [True, False]


@pytest.mark.parametrize("shape", [(64, 64), (256, 1024), (96, 160)])
def test_packed_weights_are_as_bitsandbytes_packs_them(shape: tuple[int, int]) -> None:
    packed, state = bitsandbytes.functional.quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True, blocksize=BLOCK)
    held = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert packed_bytes(shape[0] * shape[1]) == pytest.approx(held, rel=0.02)
    assert state.state2.blocksize == SCALE_BLOCK
    facts = facts_phi2()
    assert dequantised_bytes(facts, 2) == 2 * 2560 * 10240


def test_a_packed_map_counts_whole_while_its_product_is_formed() -> None:
    """The largest of maps of one input, less the output's gradients that are gone by then."""
    facts = facts_phi2()
    steps = [folded(facts, decide(switches("mixed_precision", *on), facts)) for on in ((), ("qlora",))]
    plain, packed = (step.sizes(facts, 512) for step in steps)
    wide, narrow = (next(m for m in facts.model.layer_linears if m.name.endswith(name)) for name in ("fc1", "q_proj"))
    assert unpacked(packed, [wide]) == 2 * 2560 * 10240 and unpacked(plain, [wide]) == 0
    assert unpacked(packed, [narrow] * 3) == 2 * 2560 * 2560
    assert unpacked(packed, [wide, narrow]) == 2 * 2560 * 10240 - 2 * 2560 * 512
