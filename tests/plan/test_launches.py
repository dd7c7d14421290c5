"""Operations of a layer against torch's dispatcher, which sees every one of them."""

from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from elite import geometry, hardware
from elite.bench.assemble import assembled
from elite.compose import from_overrides
from elite.config import HardwareConfig
from elite.data.batches import random_batch
from elite.optimizations import decide
from elite.plan import facts_of, launches
from elite.plan.launches import operations
from elite.streaming import Streaming
from tests.plan.helpers import switches

SMALL = ("model.hidden_size=64", "model.intermediate_size=128", "model.num_attention_heads=4", "model.vocab_size=256")
RUN = ("hardware=cpu", "model.weights=random", "tier.context=256", "tier.target_length=32", "training.global_batch_tokens=256")
WITHIN = 0.12
QUIET = ("detach", "alias", "empty")
"""Parts of the names of what launches nothing, besides views."""


pytestmark = pytest.mark.skipif(
    not hardware.device(HardwareConfig(name="cpu")).supports_bf16, reason="this CPU has no bf16, in which training converts between dtypes"
)


class Count(TorchDispatchMode):
    """Operations that would start a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view and not any(part in str(func) for part in QUIET)
        return func(*args, **(kwargs or {}))


def counted(layers: int, overrides: tuple[str, ...], again: bool = False) -> tuple[tuple[int, int], tuple[float, float]]:
    """Operations forward and backward of a model of so many layers: really, and as planned; nothing computed again.

    Args:
        again: of a step's second pass. What adapters are made ready as is made in its first.
    """
    config = from_overrides(*SMALL, *RUN, *overrides, f"model.num_hidden_layers={layers}").config
    with assembled(config) as made:
        batch = random_batch(made.plan.micro_batch, made.plan.context, made.vocab)
        if again:
            made.executors.training.loss_sum(batch)
        with Count() as forward:
            loss = made.executors.training.loss_sum(batch)
        with Count() as backward:
            loss.backward()
        facts = facts_of(config, hardware.device(config.hardware), geometry.shape(config.model), made.plan.executor)
        layout = Streaming.from_dict(made.plan.layout) if made.plan.layout else None
        planned = operations(facts, decide(config.optimizations, facts), layout)
    return (forward.number, backward.number), (planned.forward, planned.backward)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=qwen25_coder_1_5b", "model.num_key_value_heads=2", "adapter.method=full"),
        ("model=qwen25_coder_1_5b", "model.num_key_value_heads=2", "optimizations.fused_lora.enabled=false"),
        ("model=qwen25_coder_1_5b", "model.num_key_value_heads=2"),
        ("model=phi2", "model.num_key_value_heads=4", "adapter.method=full"),
        ("model=phi2", "model.num_key_value_heads=4", "optimizations.fused_lora.enabled=false"),
        ("model=phi2", "model.num_key_value_heads=4"),
    ],
    ids=" ".join,
)
def test_operations_of_a_layer(overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "ADAPTER_WEIGHT", 1.0)
    whole = (*overrides, "executor=whole", "optimizations.gradient_checkpointing.enabled=false")
    (one, planned_one), (two, planned_two) = counted(1, whole, again=True), counted(2, whole, again=True)
    for i in range(2):
        assert planned_two[i] - planned_one[i] == pytest.approx(two[i] - one[i], rel=WITHIN)


def test_operations_of_a_streamed_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "STREAMED_WEIGHT", 1.0)
    streamed = ("model=phi2", "model.num_key_value_heads=4", "executor=streamed")
    (one, planned_one), (two, planned_two) = counted(1, streamed), counted(2, streamed)
    assert planned_two[0] - planned_one[0] == pytest.approx(two[0] - one[0], rel=WITHIN)
    # Its backward computes the layer again.
    assert sum(planned_two) - sum(planned_one) == pytest.approx(two[1] - one[1], rel=WITHIN)


@pytest.mark.parametrize(("adapter", "tensors"), [("lora", 2 * 7), ("full", 7 + 2)])
def test_updates_in_8_bits_are_handed_over_one_by_one(adapter: str, tensors: int) -> None:
    small = ("model=llama31_8b", "hardware=cpu", f"adapter.method={adapter}")
    config = from_overrides(*small, "model.num_hidden_layers=3").config
    facts = facts_of(config, hardware.device(config.hardware), geometry.shape(config.model), "whole")
    assert launches.updates(facts) == launches.UPDATE_8BIT * tensors * 3


def test_a_fused_adapter_beside_a_packed_map_is_a_function_of_its_own() -> None:
    """Seven maps in each of three layers; beside maps as they are, it is theirs."""
    config = from_overrides("model=llama31_8b", "hardware=cpu", "model.num_hidden_layers=3").config
    facts = facts_of(config, hardware.device(config.hardware), geometry.shape(config.model), "whole")
    plain, packed = (operations(facts, decide(switches("fused_lora", *more), facts), None) for more in ((), ("qlora",)))
    one = launches.PACKED_ADAPTER + launches.FUSED_ADAPTER * -1 + launches.DEQUANTISED
    assert packed.forward - plain.forward == pytest.approx(one.forward * 7 * 3)
    assert packed.backward - plain.backward == pytest.approx(one.backward * 7 * 3)
