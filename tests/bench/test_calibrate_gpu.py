"""What only a CUDA GPU can show: all peaks of a configuration, nothing left behind, a cap that holds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from elite.bench.calibrate.caps import capped
from elite.bench.calibrate.measure import WATCHED, Machine, measured
from elite.bench.calibrate.sample import Drawn

pytestmark = pytest.mark.gpu

WHOLE = (
    "model=qwen25_coder_1_5b",
    "model.weights=random",
    "model.num_hidden_layers=2",
    "tier=tier1",
    "tier.context=4096",
    "tier.target_length=64",
    "training.micro_batch=1",
    "training.global_batch_tokens=4096",
    "hardware=auto",
    "adapter.method=lora",
    "adapter.rank=8",
    "executor=whole",
)
STREAMED = (*WHOLE, "executor=streamed", "executor.boundaries=host", "optimizations.memory_pool.enabled=false")


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    # A cap is the process's, in which other tests run.
    machine.cleared()


def test_every_peak_and_nothing_left(machine: Machine, cache: Path) -> None:
    offloaded = (*WHOLE, "optimizations.gradient_checkpointing.enabled=false", "optimizations.checkpoint_offload.enabled=true")
    for name, overrides in enumerate((WHOLE, STREAMED, offloaded, WHOLE)):
        row = measured(Drawn(str(name), overrides), machine, str(cache))
        assert row["outcome"] == "ran", row["error"]
        taken = row["measured"]
        assert 0 < taken["allocated_bytes"] <= taken["reserved_bytes"] < taken["device_bytes"]
        assert taken["device_method"] in ("process", "total") and len(row["steps"]) == WATCHED
        assert row["allocated_before_bytes"] < 2**20
        # A few bytes are the bench's own.
        assert (taken["host_pinned_bytes"] > 64) == (name in (1, 2))
        parts = [value for step in row["steps"] for value in step["allocated_by_part"].values()]
        assert max(parts) == taken["allocated_bytes"]


def test_a_cap_holds_and_is_lifted(machine: Machine, cache: Path) -> None:
    tight = capped(Drawn("0", WHOLE), -0.5, machine, "allocated", str(cache))
    assert tight["outcome"] == "oom" and tight["as_planned"]
    assert measured(Drawn("1", WHOLE), machine, str(cache))["outcome"] == "ran"
    ample = capped(Drawn("2", WHOLE), 1.0, machine, "needed", str(cache))
    assert ample["outcome"] == "ran" and ample["as_planned"]
