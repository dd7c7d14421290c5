"""Growing segments: less is reserved beyond what is allocated; the environment's word stays."""

from dataclasses import replace

import pytest
import torch

from elite.facts import Facts
from elite.optimizations.memory_pool import VARIABLES, MemoryPool
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
