"""The tiled MLP beyond what all optimizations share: exact gradients, tile-sized memory, a plain reason where it cannot act."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from elite.executor.whole import WholeExecutor
from elite.facts import LinearShape
from elite.optimizations.gradient_checkpointing import GradientCheckpointing
from elite.optimizations.tiled_mlp import TiledMLP
from tests.models import tiny
from tests.optimizations.test_all import FACTS
from tests.plan.live_bytes import SavedBytes
from tests.test_attention import row


def make(tile: int = 7) -> TiledMLP:
    return TiledMLP(TiledMLP.Config(enabled=True, tile=tile))


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    WholeExecutor(model, torch.float32).loss_sum(row(13, 24)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_gradients_are_the_same(kind: str, checkpointed: bool) -> None:
    model = tiny(kind)
    expected = gradients(model)
    make().apply(model)
    if checkpointed:
        GradientCheckpointing(GradientCheckpointing.Config(enabled=True)).apply(model)
    for name, gradient in gradients(model).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6 + 1e-5 * expected[name].abs().max().item()), name


def test_the_mlp_sees_tiles_and_keeps_its_input_alone() -> None:
    model = tiny("llama")
    mlp: Any = model.get_decoder().layers[0].mlp
    x, seen = torch.randn(2, 37, 32, requires_grad=True), []
    mlp.gate_proj.register_forward_hook(lambda _module, inputs, _output: seen.append(tuple(inputs[0].shape)))
    make(8).apply(model)
    saved = SavedBytes(model.parameters())
    with saved.hooks:
        out = mlp(x)
    assert seen == [(1, 8, 32)] * 9 + [(1, 2, 32)]
    # torch.utils.checkpoint also keeps an empty tensor of its own a tile.
    assert 4 * x.numel() <= saved.total <= 4 * x.numel() + 10 * 8
    out.sum().backward()
    assert len(seen) == 20


def test_undo_gives_back_an_earlier_patch() -> None:
    model = tiny("llama")
    mlp: Any = model.get_decoder().layers[0].mlp
    mlp.forward = earlier = torch.nn.Identity().forward
    undo = make().apply(model).undo
    assert undo is not None and mlp.forward is not earlier
    undo()
    assert mlp.forward == earlier


def test_it_says_why_it_cannot_act() -> None:
    assert make(4095).check(FACTS) is None
    assert make(4096).check(FACTS) == "a micro-batch of 4,096 tokens is one tile of 4,096"
    assert make(0).check(FACTS) == "a micro-batch of 4,096 tokens is one tile of 32,768"
    experts = replace(FACTS.model, layer_linears=(LinearShape("mlp.experts.0.up_proj", 32, 64),))
    assert "no plain `mlp`" in str(make().check(replace(FACTS, model=experts)))
