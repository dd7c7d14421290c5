"""Memory taken before the first step: as much as the plan says, in one piece, and none of it as tensors."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from elite.config import RunConfig
from elite.executor.whole import WholeExecutor
from elite.facts import Facts
from elite.optimizations import decide
from elite.optimizations.memory_pool import MemoryPool
from elite.training.ahead import PAGE_BYTES, SPARE, Ahead, Taking, small_to_come
from elite.training.around import loop_hooks
from tests.plan.helpers import device, phi2, switches
from tests.training.rig import adapted

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIB = 2**20


def parameters(*sizes: int) -> list[nn.Parameter]:
    """Parameters of so many bytes."""
    return [nn.Parameter(torch.empty(size // 4)) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "state_share", "roots", "expected"),
    [
        # Gradient, as much again, two states: four times the parameter.
        ((4096, MIB), 2, True, 4 * (MIB + 4096)),
        # In 8 bits a state has a quarter of its parameter's bytes: that of the larger one is small, its gradient is not.
        ((MIB, 4 * MIB), 0.5, True, 2 * MIB + 2 * MIB // 4 + 2 * MIB),
        # bitsandbytes' kernel needs nothing while it is at work.
        ((MIB, 4 * MIB), 0.5, False, MIB + 2 * MIB // 4 + 2 * MIB),
        ((4 * MIB + 1024,), 2, True, 0),
        ((MIB,), 0, True, 2 * MIB),
        # ZeRO-3: between steps a parameter has no bytes here.
        ((0, 0), 2, True, 0),
        ((0, MIB), 2, True, 4 * MIB),
    ],
)
def test_small_tensors_come_besides(sizes: tuple[int, ...], state_share: float, roots: bool, expected: float) -> None:
    assert small_to_come(parameters(*sizes), state_share * sum(sizes), roots=roots) == expected


@pytest.mark.parametrize("ahead", [0.0, 7.0])
def test_it_comes_before_all_else_where_the_plan_says_so(ahead: float) -> None:
    loaded = adapted("llama")
    taking = Taking.of(ahead, {"optimizer_state": 3.0})
    config = RunConfig(optimizations=switches("ema"))
    facts = Facts(phi2(), device("cpu"), 4096, 1, 2**20, "lora")
    executor, optimizer = WholeExecutor(loaded.model, torch.float32), torch.optim.AdamW(loaded.trainable)
    parts = (config, decide(config.optimizations, facts), executor, optimizer, loaded.trainable, 5, CPU)
    hooks, _ = loop_hooks(*parts, taking, rehearse=lambda: 0.0)
    assert [hook.name for hook in hooks] == (["take_ahead"] if ahead else []) + ["ema"]
    assert not ahead or (isinstance(hooks[0], Ahead) and hooks[0].counts() == {"ahead_bytes": 0.0, "alloc_retries": 0.0})


@pytest.fixture
def growing() -> Iterator[None]:
    """Segments that grow page by page."""
    torch.cuda.empty_cache()
    applied = MemoryPool(MemoryPool.Config(enabled=True)).apply(None)
    yield
    assert applied.undo is not None
    torch.cuda.empty_cache()
    applied.undo()


@pytest.mark.gpu
@pytest.mark.usefixtures("growing")
def test_the_step_is_cut_from_what_was_taken() -> None:
    weights = [nn.Parameter(torch.zeros(64 * MIB, device=CUDA))]
    target = torch.cuda.memory_reserved() + 512 * MIB
    hook = Ahead(Taking(target, 0.0), torch.optim.AdamW(weights), weights, CUDA)
    hook.begin()
    assert abs(torch.cuda.memory_reserved() - target) <= PAGE_BYTES
    assert abs(hook.counts()["ahead_bytes"] - 512 * MIB) <= PAGE_BYTES
    assert torch.cuda.max_memory_allocated() < target - 256 * MIB
    reserved = torch.cuda.memory_reserved()
    held = [torch.empty(size * MIB, dtype=torch.uint8, device=CUDA) for size in (200, 3, 150, 40)]
    del held[1], held[1]
    held.append(torch.empty(140 * MIB, dtype=torch.uint8, device=CUDA))
    assert torch.cuda.memory_reserved() == reserved


@pytest.mark.gpu
@pytest.mark.usefixtures("growing")
def test_room_that_loading_left_counts() -> None:
    """Ends of pages begin the piece, and small tensors have what is reserved for small ones."""
    free = [torch.zeros(size, dtype=torch.uint8, device=CUDA) for size in (90 * MIB, 25 * MIB, *([MIB] * 48))]
    del free[0], free[1:-1:2]
    weights = [nn.Parameter(torch.zeros(MIB // 4, device=CUDA)) for _ in range(8)]
    target = torch.cuda.memory_reserved() + 512 * MIB
    hook = Ahead(Taking(target, 16.0 * MIB), torch.optim.AdamW(weights), weights, CUDA)
    hook.begin()
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    large = torch.empty(480 * MIB, dtype=torch.uint8, device=CUDA)
    # Half of the 32 MiB of gradients, states and roots lie in gaps that weights have left.
    assert abs(torch.cuda.max_memory_reserved() - target) <= PAGE_BYTES
    del large, free


@pytest.mark.gpu
@pytest.mark.usefixtures("growing")
def test_what_the_device_does_not_have_is_not_taken() -> None:
    weights = [nn.Parameter(torch.zeros(MIB, device=CUDA))]
    before = torch.cuda.memory_reserved()
    hook = Ahead(Taking(2.0**50, 0.0), torch.optim.AdamW(weights), weights, CUDA)
    hook.begin()
    assert hook.counts()["ahead_bytes"] == 0 and torch.cuda.memory_reserved() <= before


def taken(mib: int) -> tuple[Ahead, float]:
    """What has taken so much beyond what is reserved now, and all that is planned."""
    weights = [nn.Parameter(torch.zeros(MIB, device=CUDA))]
    planned = float(torch.cuda.memory_reserved() + mib * MIB)
    hook = Ahead(Taking(planned, 0.0), torch.optim.AdamW(weights), weights, CUDA)
    hook.begin()
    return hook, planned


@pytest.mark.gpu
@pytest.mark.usefixtures("growing")
def test_what_is_needed_beyond_extends_the_piece() -> None:
    taken(512)
    reserved = torch.cuda.memory_reserved()
    held = [torch.empty(size * MIB, dtype=torch.uint8, device=CUDA) for size in (200, 400)]
    # A block of its own would take 400 MiB.
    assert torch.cuda.memory_reserved() - reserved <= 88 * MIB + 2 * PAGE_BYTES
    del held


@pytest.mark.gpu
@pytest.mark.usefixtures("growing")
def test_gaps_are_filled_where_gradients_are_added_up() -> None:
    hook, planned = taken(1024)
    assert torch.cuda.get_per_process_memory_fraction(CUDA) == 1.0
    for held in (True, False):
        with hook.accumulating() if held else nullcontext():
            there = [torch.full((100 * MIB,), i, dtype=torch.uint8, device=CUDA) for i in range(9)]
            # 500 MiB are free, and no more than 200 of them beside each other.
            del there[1], there[2], there[3], there[4]
            large = torch.full((400 * MIB,), 9, dtype=torch.uint8, device=CUDA)
            assert [int(tensor.float().mean()) for tensor in (*(one[:1024] for one in there), large[-1024:])] == [0, 2, 4, 6, 8, 9]
        assert torch.cuda.get_per_process_memory_fraction(CUDA) == 1.0
        beyond = torch.cuda.max_memory_reserved() - planned
        assert beyond <= SPARE * planned if held else beyond >= 150 * MIB
        assert hook.counts()["alloc_retries"] == 1
        del there, large


@pytest.mark.gpu
@pytest.mark.usefixtures("growing")
def test_what_takes_more_than_was_planned_gets_it_the_second_time() -> None:
    hook, _ = taken(256)
    with pytest.raises(torch.OutOfMemoryError), hook.accumulating():
        torch.empty(512 * MIB, dtype=torch.uint8, device=CUDA)
    assert hook.yields() and not hook.yields()
    with hook.accumulating():
        assert torch.empty(512 * MIB, dtype=torch.uint8, device=CUDA).nbytes == 512 * MIB


@pytest.mark.gpu
def test_the_piece_grows_unless_the_environment_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    for said in (None, "expandable_segments:False"):
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
        if said is not None:
            monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", said)
        loaded = adapted("llama")
        facts = Facts(phi2(), device("cpu"), 4096, 1, 2**20, "lora")
        executor, optimizer = WholeExecutor(loaded.model, torch.float32), torch.optim.AdamW(loaded.trainable)
        parts = (RunConfig(), decide(switches(), facts), executor, optimizer, loaded.trainable, 5, torch.device("cuda"))
        _, applied = loop_hooks(*parts, Taking(7.0, 3.0), rehearse=lambda: 0.0)
        assert ("take_ahead" in applied) is (said is None)
        for act in applied.values():
            assert act.undo is not None
            act.undo()
