"""The batch finder against the true largest micro-batch, on a real GPU under a real cap."""

import gc
from collections.abc import Iterator

import pytest
import torch

from elite import compose, geometry, hardware
from elite.executor.build import whole
from elite.facts import GIB, NO_CORPUS
from elite.model import load
from elite.optimizations import decide
from elite.plan import facts_of, make_plan
from elite.prepared import compute_dtype
from elite.training.batch_finder import PROBES, TOLERANCE, find
from elite.training.trial import Subject, Trial, attempt, one_pass

pytestmark = pytest.mark.gpu
CAP_BYTES = 7 * GIB
CONTEXT = 2048
MOST = 256


@pytest.fixture
def capped() -> Iterator[torch.device]:
    where = torch.device("cuda", 0)
    torch.cuda.set_per_process_memory_fraction(CAP_BYTES / torch.cuda.get_device_properties(where).total_memory, where)
    yield where
    torch.cuda.set_per_process_memory_fraction(1.0, where)
    gc.collect()
    torch.cuda.empty_cache()


def subject(where: torch.device) -> tuple[Subject, int]:
    """SmolLM2's geometry at 2,048 tokens in the standard preset, and the plan's own answer."""
    request = ("model=smollm2_135m", "model.weights=random", "tier=tier1", f"tier.context={CONTEXT}", "executor=whole", "hardware=rtx2060s")
    batch = ("hardware.cap=memory", "training.micro_batch=auto", f"training.global_batch_tokens={CONTEXT * MOST}")
    config = compose.from_overrides(*request, *batch, "plan.headroom_fraction=0").config
    machine = hardware.device(config.hardware)
    shape = geometry.shape(config.model)
    decisions = decide(config.optimizations, facts_of(config, machine, shape))
    dtype, _ = compute_dtype(decisions, machine)
    loaded = load(config, decisions, dtype, where)
    plan = make_plan(config, machine, shape, NO_CORPUS)
    assert plan.largest_micro_batch is not None
    executor = whole(loaded, dtype)
    held = plan.memory["optimizer_state"]
    return Subject(executor, dtype, loaded.trainable, shape.vocab_size, CONTEXT, where, CAP_BYTES, held), plan.largest_micro_batch


def runs(one: Subject, sequences: int) -> bool:
    """Whether a pass goes well, tried without the code under test."""
    torch.cuda.empty_cache()
    held = torch.empty(int(one.held_bytes), dtype=torch.uint8, device=one.device)
    for parameter in one.trainable:
        parameter.grad = torch.zeros_like(parameter)
    try:
        one_pass(one, sequences)()
        done = True
    except torch.OutOfMemoryError:
        done = False
    for parameter in one.trainable:
        parameter.grad = None
    del held
    gc.collect()
    return done


@pytest.mark.parametrize("guess_share", [1.0, 0.3, 3.0])
def test_it_lands_within_five_percent_of_the_true_largest(capped: torch.device, guess_share: float) -> None:
    one, planned = subject(capped)

    def probe(sequences: int) -> Trial:
        return attempt(one, sequences, one_pass(one, sequences), gradients=True)

    found = find(probe, max(1, int(planned * guess_share)), MOST, CAP_BYTES)
    assert 0 < found.largest < MOST and found.proven and len(found.trials) <= PROBES
    low, high = found.largest, MOST + 1
    assert runs(one, low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if runs(one, middle) else (low, middle)
    print(f"planned {planned}, guess × {guess_share}, found {found.largest}, true {low}, probes {[t.sequences for t in found.trials]}")
    assert found.largest >= (1 - TOLERANCE) * low


def test_a_failed_probe_gives_its_memory_back(capped: torch.device) -> None:
    one, _ = subject(capped)
    before = torch.cuda.memory_allocated()
    state = torch.cuda.get_rng_state()
    assert attempt(one, MOST, one_pass(one, MOST), gradients=True).out_of_memory
    after = torch.cuda.memory_allocated()
    # cuBLAS and the like keep their workspaces, a checkpoint's shelf a layer's input at most.
    assert after - before < 256 * 2**20
    assert torch.equal(state, torch.cuda.get_rng_state()) and all(p.grad is None for p in one.trainable)
