"""Which products a recomputation leaves out, and that it leaves them out. That gradients stay right is what test_attach.py shows."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from elite.executor.streamed.attach import attach
from elite.optimizations.functions.unread import UnreadOutputs
from elite.optimizations.fused_lora import FusedLoRA
from elite.streaming import Streaming
from tests.executor.streamed.exactness import assert_same, gradients, tokens, uneven
from tests.models import tiny

IDS = tokens(1, 48)
LAYOUT = Streaming(chunk=16, block=16)


def step(model: Any, layout: Streaming = LAYOUT) -> tuple[list[str], int]:
    """What is left out in the first layer, and the operations of a step that knows it already."""
    attached = attach(model, layout)
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.zero_grad(set_to_none=True)
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=IDS, labels=IDS).loss.backward()
    attached.undo()
    return attached.runner.unread.names(0), counter.get_total_flops()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", ["mlp.down_proj"]),
        ("phi", ["self_attn.dense", "mlp.fc2"]),
        ("gpt_neox", ["attention.dense", "mlp.dense_4h_to_h"]),
        ("starcoder2", ["mlp.c_proj"]),
        ("gemma3_text", []),  # a norm reads what the MLP gives
    ],
)
def test_maps_whose_output_only_joins_the_residual_stream(kind: str, expected: list[str]) -> None:
    assert step(tiny(kind, attention="eager"))[0] == expected


def test_their_products_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", attention="eager")
    _, fewer = step(model)
    monkeypatch.setattr(UnreadOutputs, "find", lambda *_: None)
    names, all_of_them = step(model)
    config = model.config
    product = 2 * IDS.shape[1] * config.intermediate_size * config.hidden_size
    assert names == [] and all_of_them - fewer == config.num_hidden_layers * product


@pytest.mark.parametrize("fused", [False, True])
def test_adapters(fused: bool) -> None:
    """The same gradients as without streaming, whoever computes the adapted map; what is replaced comes back."""
    model: Any = get_peft_model(uneven("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.nn.init.normal_(model.get_base_model().get_decoder().layers[0].mlp.down_proj.lora_B.default.weight)
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = gradients(model)
    undo = FusedLoRA(FusedLoRA.Config(enabled=True)).apply(model.get_base_model()).undo if fused else None
    attached = attach(model, LAYOUT)
    model(input_ids=IDS, labels=IDS).loss.backward()
    names = ["mlp.down_proj"] if fused else ["mlp.down_proj.base_layer", "mlp.down_proj.lora_B.default"]
    assert attached.runner.unread.names(0) == names
    found = gradients(model)
    for name in [name for name, right in expected.items() if right is None or not right.norm()]:
        # B starts at zero in the other maps, and A has no gradient then.
        assert found.pop(name) is not None and expected.pop(name) is not None
    assert_same(found, expected)
    attached.undo()
    if undo is not None:
        undo()
    assert not any("forward" in module.__dict__ or hasattr(module, "output_unread") for module in model.modules())
