"""Fused LoRA against peft's own forward: outputs, every gradient, dropout's masks, quantised bases."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elite import geometry
from elite.optimizations.contract import Applied, Estimate, Step
from elite.optimizations.functions import lora
from elite.optimizations.fused_lora import FusedLoRA
from elite.optimizations.gradient_checkpointing import GradientCheckpointing
from elite.optimizations.qlora import QLoRA
from elite.plan.batch import facts_of
from tests.models import tiny
from tests.plan.helpers import device, run_config
from tests.plan.live_bytes import SavedBytes
from tests.test_attention import row


def adapted(kind: str = "llama", dropout: float = 0.0, packed: bool = False, rank: int = 8, **options: Any) -> Any:
    """A tiny model with adapters whose B is not zero."""
    core = tiny(kind, hidden_size=64)
    if packed:
        QLoRA(QLoRA.Config(enabled=True)).apply(core)
        nn.Module.to(core, torch.device("cpu"))
    config = LoraConfig(
        r=rank, lora_alpha=10, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    torch.manual_seed(3)
    model = get_peft_model(core, config).train()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
    return model


def fuse(model: Any) -> Applied:
    return FusedLoRA(FusedLoRA.Config(enabled=True)).apply(model.get_base_model())


def run(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Logits and every gradient, of parameters and of the embedded input."""
    model.zero_grad()
    batch, embedding = row(13, 24), model.get_input_embeddings()
    embedded = embedding(batch.input_ids).detach().requires_grad_()
    torch.manual_seed(11)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(inputs_embeds=embedded, documents=batch.documents, use_cache=False).logits
    (logits.float() * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
    assert embedded.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), "input": embedded.grad, **gradients}


def assert_close(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name, expected in two.items():
        error = (one[name].double() - expected.double()).norm() / expected.double().norm()
        assert expected.any() and error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize(("dropout", "rank"), [(0.0, 8), (0.0, 3), (0.3, 8)])
@pytest.mark.parametrize("kind", ["llama", "phi", "qwen3"])
def test_outputs_and_gradients_are_those_of_peft(kind: str, dropout: float, rank: int) -> None:
    model = adapted(kind, dropout, rank=rank)
    expected = run(model)
    applied = fuse(model)
    assert applied.count == sum(isinstance(module, LoraLayer) for module in model.modules()) == (12 if kind == "phi" else 14)
    fused = run(model)
    assert_close(fused, expected, 1e-5)
    assert any(not torch.equal(fused[name], expected[name]) for name in fused), "peft's own forward ran"
    assert applied.undo is not None
    applied.undo()
    for name, tensor in run(model).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_packed_base_keeps_its_forward(dropout: float) -> None:
    model = adapted(dropout=dropout, packed=True)
    expected = run(model)
    assert fuse(model).count == 14
    assert_close(run(model), expected, 1e-5)


def test_a_packed_base_in_half_precision() -> None:
    """Frozen weights and activations in bf16, adapters in fp32, as a run has them."""
    model = adapted(packed=True)
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    expected = run(model, torch.bfloat16)
    fuse(model)
    assert_close(run(model, torch.bfloat16), expected, 6e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_under_gradient_checkpointing(packed: bool) -> None:
    model = adapted(dropout=0.3, packed=packed)
    expected = run(model)
    fuse(model)
    GradientCheckpointing(GradientCheckpointing.Config(enabled=True)).apply(model.get_base_model())
    assert_close(run(model), expected, 1e-5)


def test_half_precision_is_as_close_to_the_truth_as_peft() -> None:
    model = adapted("phi")
    truth = run(model)
    theirs = run(model, torch.bfloat16)
    fuse(model)
    ours = run(model, torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: tensor.dtype for name, tensor in theirs.items()}
    error, allowed = (
        sum(((other[name].float() - exact).norm() / exact.norm()).item() ** 2 for name, exact in truth.items()) for other in (ours, theirs)
    )
    assert 0 < error <= 1.1 * allowed


def test_trained_base_weights_still_get_their_gradient() -> None:
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.get_input_embeddings().weight.requires_grad_(False)
    expected = run(model)
    fuse(model)
    assert_close(run(model), expected, 1e-5)


def test_an_adapter_switched_off_stays_off() -> None:
    model = adapted()
    batch = row(9)
    fuse(model)
    on = model(input_ids=batch.input_ids, documents=batch.documents).logits
    with model.disable_adapter():
        off = model(input_ids=batch.input_ids, documents=batch.documents).logits
    plain = tiny("llama", hidden_size=64)(input_ids=batch.input_ids, documents=batch.documents).logits
    assert torch.equal(off, plain) and not torch.equal(on, plain)


def test_variants_are_left_alone() -> None:
    applied = fuse(adapted(use_dora=True))
    assert applied.count == 0 and applied.detail == "of 14 adapted linear maps"


def trained(fused: bool, optimizer: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Adapters after three steps."""
    model = adapted("phi")
    if fused:
        fuse(model)
    made = optimizer([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(3):
        run(model, dtype)
        made.step()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, bitsandbytes.optim.AdamW8bit])
def test_every_step_reads_the_adapters_of_the_last(optimizer: Any) -> None:
    """Also where the optimizer writes through pointers, which leave no trace on the tensor."""
    theirs, ours = trained(False, optimizer, torch.float32), trained(True, optimizer, torch.float32)
    before = {name: p for name, p in adapted("phi").named_parameters() if p.requires_grad}
    for name, expected in theirs.items():
        moved = (expected - before[name]).norm()
        assert moved > 0 and (ours[name] - expected).norm() < 1e-2 * moved, name


@pytest.mark.parametrize("change", [lambda p: p.mul_(2), lambda p: p.copy_(p.roll(1, 0))])
def test_a_written_adapter_is_read_anew(change: Callable[[Tensor], object]) -> None:
    model, reference = adapted("phi"), adapted("phi")
    fuse(model)
    run(model)
    for one in (model, reference):
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if "lora_" in name:
                    change(parameter)
    assert_close(run(model), run(reference), 1e-5)


def test_copies_are_made_once_a_step_and_cost_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("phi")
    fuse(model)
    made = list[lora.Ready]()

    def kept(*arguments: Any) -> lora.Ready:
        made.append(ready(*arguments))
        return made[-1]

    ready = lora._ready
    monkeypatch.setattr(lora, "_ready", kept)
    run(model, torch.bfloat16)
    count = len(made)
    run(model, torch.bfloat16)
    assert len(made) == count == 2 * 4
    copied = sum(t.nbytes for one in made for t in (one.above, *one.beside))
    shape = geometry._shape("tiny", model.get_base_model().config.to_json_string(use_diff=False))
    facts = facts_of(run_config(), device("h100"), shape)
    facts = replace(facts, trainable_params=shape.lora_params(8))
    optimization = FusedLoRA(FusedLoRA.Config(enabled=True))
    assert optimization.memory(Step(Estimate(), value=2), facts).standing.trainable_copy == copied


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_input_is_kept_once(dropout: float) -> None:
    """x (or what dropout made of it, and its mask), and r values a token: no second copy of the input or the output."""
    layer = adapted(dropout=dropout)
    fuse(layer)
    linear = layer.get_base_model().get_decoder().layers[0].mlp.up_proj
    x = torch.randn(50, 64, requires_grad=True)
    saved = SavedBytes([*layer.parameters()])
    with saved.hooks:
        linear(x)
    mask = 4 * 50 * 64 if dropout else 0
    assert saved.total == 4 * 50 * (64 + 8) + mask


def test_the_function_alone_under_checkpoint() -> None:
    model = adapted()
    fuse(model)
    linear = model.get_base_model().get_decoder().layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x)
    (got,) = torch.autograd.grad(checkpoint(linear, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(got, expected)


def siblings(**options: Any) -> tuple[Any, Any]:
    """The attention of a fused model, whose three maps take one input, and that of the same model under peft."""
    ours, theirs = adapted("phi", **options), adapted("phi", **options)
    fuse(ours)
    first, second = (model.get_base_model().get_decoder().layers[0].self_attn for model in (ours, theirs))
    return first, second


def check(attention: Any, reference: Any, inputs: str = "xxx", used: str = "qkv") -> None:
    """Outputs of the maps, called in turn on the inputs named, and gradients where only some of them are `used`."""
    torch.manual_seed(5)
    values, results = {name: torch.randn(2, 5, 64) for name in sorted(set(inputs))}, []
    for module in (attention, reference):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        maps = {name: getattr(module, f"{name}_proj") for name in "qkv"}
        outputs = {name: maps[name](leaves[given]) for name, given in zip("qkv", inputs, strict=True)}
        wanted = [leaves[given] for given in dict.fromkeys(g for g, name in zip(inputs, "qkv", strict=True) if name in used)]
        wanted += [p for name in used for p in maps[name].parameters() if p.requires_grad]
        total = torch.stack([outputs[name].square().sum() for name in used]).sum()
        results.append([*outputs.values(), *torch.autograd.grad(total, wanted)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("used", ["qkv", "qv", "k"])
def test_siblings_are_one_function(used: str) -> None:
    attention, reference = siblings()
    x = torch.randn(2, 5, 64, requires_grad=True)
    assert attention.q_proj(x).grad_fn is attention.k_proj(x).grad_fn is attention.v_proj(x).grad_fn
    check(attention, reference, used=used)


def test_siblings_on_different_inputs_are_several_functions() -> None:
    for inputs in ("xyx", "yyx", "xyy"):
        check(*siblings(), inputs)


def test_what_changed_since_the_first_sibling_counts() -> None:
    attention, reference = siblings()
    x = torch.randn(5, 64)
    attention.q_proj(x)
    x += 1
    torch.testing.assert_close(attention.k_proj(x), reference.k_proj(x))
    attention.q_proj(x)
    with torch.no_grad():
        assert not attention.v_proj(x).requires_grad
    attention.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.v_proj(x).dtype is torch.bfloat16


def test_a_sibling_switched_off_stays_off() -> None:
    attention, reference = siblings()
    for module in (attention, reference):
        module.k_proj.enable_adapters(False)
    check_values(attention, reference)


def test_dropout_is_drawn_for_every_sibling() -> None:
    attention, _ = siblings(dropout=0.3)
    x = torch.randn(5, 64)
    assert attention.q_proj(x).grad_fn is not attention.k_proj(x).grad_fn


def check_values(attention: Any, reference: Any) -> None:
    x = torch.randn(5, 64)
    for name in "qkv":
        torch.testing.assert_close(getattr(attention, f"{name}_proj")(x), getattr(reference, f"{name}_proj")(x))


def test_nothing_of_a_pass_is_held() -> None:
    attention, _ = siblings()
    x = torch.randn(5, 64)
    held = weakref.ref(x)
    for name in "qkv":
        getattr(attention, f"{name}_proj")(x)
    del x
    assert held() is None
