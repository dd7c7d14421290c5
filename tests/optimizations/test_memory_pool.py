"""Growing segments: less is reserved beyond what is allocated; the environment's word stays."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from elite import geometry, hardware
from elite.compose import from_overrides
from elite.facts import Facts
from elite.model import load
from elite.optimizations import decide
from elite.optimizations.memory_pool import VARIABLES, MemoryPool, growing
from elite.plan.batch import facts_of
from tests.optimizations.test_all import FACTS

GPU = replace(FACTS, device=replace(FACTS.device, kind="cuda"))
MIB = 2**20


def made() -> MemoryPool:
    return MemoryPool(MemoryPool.Config(enabled=True))


@pytest.fixture(autouse=True)
def _no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("facts", "reason"), [(FACTS, "CPU"), (GPU, None)])
def test_it_is_for_gpus(facts: Facts, reason: str | None) -> None:
    said = made().check(facts)
    assert said is None if reason is None else said is not None and reason in said


@pytest.mark.parametrize("name", VARIABLES)
def test_the_environment_wins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "garbage_collection_threshold:0.8")
    assert name in str(made().check(GPU))


def _reserved_beyond() -> int:
    """Bytes that ever larger tensors leave behind, each too large for the place of the last."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    # Segments that tensors of other tests keep half full are none of theirs.
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    for size in range(64, 1024, 64):
        tensor = torch.empty(size * MIB, dtype=torch.uint8, device="cuda")
        del tensor
    return torch.cuda.max_memory_reserved() - torch.cuda.max_memory_allocated() - held


@pytest.mark.gpu
def test_little_is_reserved_beyond_what_is_allocated() -> None:
    before = _reserved_beyond()
    applied = made().apply(None)
    try:
        within = _reserved_beyond()
    finally:
        assert applied.undo is not None
        torch.cuda.empty_cache()
        applied.undo()
    assert before > 1024 * MIB and within < 64 * MIB


@pytest.mark.gpu
def test_random_weights_leave_nothing_behind_once_they_are_packed() -> None:
    overrides = ("model.weights=random", "model.num_hidden_layers=4", "optimizations.qlora.enabled=true", "executor=whole")
    config = from_overrides("model=qwen25_coder_1_5b", "optimizations=none", *overrides).config
    facts = facts_of(config, hardware.device(config.hardware), geometry.shape(config.model), "whole")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    loaded = load(config, decide(config.optimizations, facts), torch.bfloat16, torch.device("cuda", 0))
    torch.cuda.empty_cache()
    # Of each bf16 map three quarters would stay: 270 MiB.
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - before < 64 * MIB
    del loaded


@pytest.mark.gpu
def test_segments_grow_within_and_not_after() -> None:
    for part in (growing(), nullcontext()):
        with part:
            beyond = _reserved_beyond()
        assert beyond < 64 * MIB if not isinstance(part, nullcontext) else beyond > 1024 * MIB
        torch.cuda.empty_cache()
