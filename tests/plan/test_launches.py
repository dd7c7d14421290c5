"""Operations of a layer against torch's dispatcher, which sees every one of them."""

import json
from dataclasses import replace
from statistics import median
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from elite import geometry, hardware
from elite.bench.assemble import assembled
from elite.bench.host_paths import paths
from elite.chunks import cut
from elite.compose import from_overrides
from elite.config import HardwareConfig
from elite.data.batches import random_batch
from elite.optimizations import decide
from elite.plan import facts_of, launches, streamed
from elite.plan.executors import choose_executor
from elite.plan.launches import operations, phases
from elite.plan.time import recomputed
from elite.report.measurement import MEASUREMENTS
from elite.streaming import Streaming
from tests.plan.helpers import switches

SMALL = ("model.hidden_size=64", "model.intermediate_size=128", "model.num_attention_heads=4", "model.vocab_size=256")
RUN = ("hardware=cpu", "model.weights=random", "tier.context=256", "tier.target_length=32", "training.global_batch_tokens=256")
WITHIN = 0.12
OPERATION_S = 16.8e-6
"""Of those two machines' hosts in runs."""
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


@pytest.mark.parametrize("model", ["model=qwen25_coder_1_5b", "model=phi2"])
def test_operations_of_a_layer(model: str) -> None:
    """Whose weights are trained: nothing stands around its maps."""
    heads = "model.num_key_value_heads=" + ("4" if "phi" in model else "2")
    whole = (model, heads, "adapter.method=full", "executor=whole", "optimizations.gradient_checkpointing.enabled=false")
    (one, planned_one), (two, planned_two) = counted(1, whole, again=True), counted(2, whole, again=True)
    for i in range(2):
        assert planned_two[i] - planned_one[i] == pytest.approx(two[i] - one[i], rel=WITHIN)


def errors_of_paths() -> dict[str, float]:
    """Operations of a step times one figure for both machines, over the seconds that were measured, less one."""
    found, overrides = {}, {(name, model, layers): chosen for name, model, layers, chosen in paths()}
    for row in json.loads((MEASUREMENTS / "host_paths.json").read_text())["rows"]:
        config = from_overrides(*overrides[row["name"], row["model"], row["layers"]], "hardware=h100").config
        made = choose_executor(config, hardware.device(config.hardware), geometry.shape(config.model), 1)
        again = recomputed(made.decisions) if made.layout is None else streamed.recomputed(made.facts, made.layout)
        handed = phases(made.facts, made.decisions, made.layout, again[0])
        update = launches.updates(made.facts, in_8_bits=row["name"].endswith("8 bits"))
        planned = (handed.forward + handed.backward + update) * OPERATION_S
        real = row["forward_s"] + row["backward_s"] + row["update_s"]
        found[f"{row['model']} {row['layers']} {row['name']}"] = planned / real - 1
    return found


def test_paths_are_planned_as_they_were_measured() -> None:
    """By two machines, the faster of which counts; what neither was undisturbed for is off by most."""
    found = errors_of_paths()
    assert len(found) >= 60 and median(map(abs, found.values())) < 0.05
    assert not {name: f"{error:+.0%}" for name, error in found.items() if abs(error) > 0.2}


@pytest.mark.parametrize(("adapter", "tensors"), [("lora", 2 * 7), ("full", 7 + 2)])
def test_tensors_are_updated_at_once_but_for_those_in_8_bits(adapter: str, tensors: int) -> None:
    small = ("model=llama31_8b", "hardware=cpu", f"adapter.method={adapter}")
    config = from_overrides(*small, "model.num_hidden_layers=3").config
    facts = facts_of(config, hardware.device(config.hardware), geometry.shape(config.model), "whole")
    plain, in_8_bits = (launches.updates(facts, in_8_bits=on) for on in (False, True))
    assert plain == launches.AROUND_UPDATE + launches.UPDATE * tensors * 3
    assert in_8_bits - plain == pytest.approx(launches.UPDATE_8BIT * tensors * 3)


@pytest.mark.parametrize(("name", "cost"), [("gradient_checkpointing", launches.CHECKPOINTED), ("checkpoint_offload", launches.OFFLOADED)])
def test_layers_that_are_computed_again_pass_python(name: str, cost: launches.Cost) -> None:
    config = from_overrides("model=llama31_8b", "hardware=h100", "model.num_hidden_layers=3").config
    facts = facts_of(config, hardware.device(config.hardware), geometry.shape(config.model), "whole")
    assert launches.recomputing(facts, decide(switches(name), facts)) == cost * 3
    assert launches.recomputing(facts, decide(switches(name, "fused_lora"), facts)).forward < cost.forward * 3
    assert launches.recomputing(facts, decide(switches("fused_lora"), facts)) == launches.Cost(0, 0)


@pytest.mark.parametrize(
    ("rows", "context", "chunk"), [(3, 5376, 2048), (3, 5376, 8192), (4, 2048, 8192), (5, 2048, 8192), (1, 4096, 8192)]
)
def test_chunks_are_counted_as_rows_are_cut(rows: int, context: int, chunk: int) -> None:
    config = from_overrides("model=llama31_8b", "hardware=h100").config
    known = facts_of(config, hardware.device(config.hardware), geometry.shape(config.model), "streamed")
    facts = replace(known, context=context, micro_batch=rows)
    assert launches.chunks(facts, Streaming(chunk=chunk)) == sum(map(len, cut([context] * rows, chunk)))


def test_a_fused_adapter_beside_a_packed_map_is_a_function_of_its_own() -> None:
    """Seven maps in each of three layers; beside maps as they are, it is theirs."""
    config = from_overrides("model=llama31_8b", "hardware=cpu", "model.num_hidden_layers=3").config
    facts = facts_of(config, hardware.device(config.hardware), geometry.shape(config.model), "whole")
    plain, packed = (operations(facts, decide(switches("fused_lora", *more), facts), None) for more in ((), ("qlora",)))
    one = launches.PACKED_ADAPTER + launches.FUSED_ADAPTER * -1 + launches.DEQUANTISED
    assert packed.forward - plain.forward == pytest.approx(one.forward * 7 * 3)
    assert packed.backward - plain.backward == pytest.approx(one.backward * 7 * 3)
