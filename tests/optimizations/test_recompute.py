"""Recomputed layers: gradients are torch's own, bit for bit, random numbers too, and products that nobody reads are left out."""

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from elite.executor.whole import WholeExecutor
from elite.optimizations.functions.recompute import FEW, Recomputed
from elite.optimizations.fused_lora import FusedLoRA
from tests.models import tiny
from tests.test_attention import row

LENGTHS = (13, 24)


def adapted(kind: str, fused: bool, **changes: Any) -> Any:
    model: Any = get_peft_model(
        tiny(kind, hidden_size=64, **changes), LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    if fused:
        FusedLoRA(FusedLoRA.Config(enabled=True)).apply(model.get_base_model())
    return model.train()


def core(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def step(model: Any, lengths: tuple[int, ...] = LENGTHS) -> tuple[dict[str, Tensor], Tensor]:
    """Every gradient, and the random state afterwards."""
    torch.manual_seed(7)
    WholeExecutor(model, torch.bfloat16).loss_sum(row(*lengths)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, torch.get_rng_state()


def make(kind: str, how: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    return tiny(kind, **changes).train() if how == "full" else adapted(kind, how == "fused", **changes)


@pytest.mark.parametrize("how", ["full", "peft", "fused"])
@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("phi", {"resid_pdrop": 0.3}), ("gemma3_text", {}), ("lfm2", {})])
def test_gradients_and_random_numbers_are_those_of_torch(kind: str, changes: dict[str, Any], how: str) -> None:
    ours, theirs = make(kind, how, **changes), make(kind, how, **changes)
    Recomputed(core(ours).get_decoder().layers)
    for layer in core(theirs).get_decoder().layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    (got, state), (expected, their_state) = step(ours), step(theirs)
    assert got.keys() == expected.keys() and got
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    assert torch.equal(state, their_state)


@pytest.mark.parametrize(
    ("kind", "how", "expected"),
    [
        ("llama", "fused", ["mlp.down_proj"]),
        ("phi", "fused", ["self_attn.dense", "mlp.fc2"]),
        ("gemma3_text", "fused", []),  # a norm reads what the MLP gives
        ("llama", "peft", []),  # its maps would save other tensors
        ("llama", "full", []),
    ],
)
def test_what_is_left_out(kind: str, how: str, expected: list[str]) -> None:
    model = make(kind, how)
    made = Recomputed(core(model).get_decoder().layers)
    step(model)
    assert made.left_out(1) == expected


def test_their_products_cost_nothing() -> None:
    operations = []
    for find in (True, False):
        model = make("llama", "fused")
        made = Recomputed(core(model).get_decoder().layers)
        if not find:
            made._unread.nothing()
        else:
            step(model)
        with FlopCounterMode(display=False) as counter:
            step(model)
        operations.append(counter.get_total_flops())
    config = core(model).config
    product = 2 * sum(LENGTHS) * config.intermediate_size * config.hidden_size
    # The counter does not see what is added in place, the adapter's part.
    assert operations[1] - operations[0] == config.num_hidden_layers * product


def test_longer_sequences_are_tried_on_their_beginning() -> None:
    model, seen = make("llama", "fused"), set()
    layers = core(model).get_decoder().layers
    # Of layers that are alike the last is tried.
    layers[1].mlp.register_forward_pre_hook(lambda _module, args: seen.add(args[0].shape[1]))
    made = Recomputed(layers)
    step(model)
    assert seen == {FEW, sum(LENGTHS)} and made.left_out(0)


@pytest.mark.parametrize("size", ["hidden_size", "head_dim"])
def test_as_many_tokens_as_a_vector_has_values(size: str) -> None:
    model = make("llama", "fused")
    made, config = Recomputed(core(model).get_decoder().layers), core(model).config
    step(model, (FEW // 2, (config.hidden_size if size == "hidden_size" else config.head_dim) - FEW // 2))
    assert made.left_out(1) == ["mlp.down_proj"]


def test_a_layer_that_cannot_be_tried_is_recomputed_in_full(caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama", "fused")
    expected, _ = step(make("llama", "fused"))
    layers = core(model).get_decoder().layers

    def picky(forward: Any, hidden: Tensor, **kwargs: Any) -> Any:
        if hidden.shape[1] == FEW:
            raise ValueError("too short")
        return forward(hidden, **kwargs)

    for layer in layers:
        layer.forward = partial(picky, layer.forward)
    made = Recomputed(layers)
    got, _ = step(model)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
    assert "too short" in caplog.text and not made.left_out(0)
    made.undo()
    assert layers[0].forward.func is picky


def test_a_lack_of_memory_says_nothing_of_the_layers() -> None:
    model = make("llama", "fused")
    layers = core(model).get_decoder().layers
    made = Recomputed(layers)

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("not now")

    handle = layers[1].mlp.register_forward_pre_hook(refuse)
    with pytest.raises(torch.OutOfMemoryError):
        step(model)
    handle.remove()
    step(model)
    assert made.left_out(1) == ["mlp.down_proj"]
