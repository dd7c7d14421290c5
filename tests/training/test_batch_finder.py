"""The search for the largest micro-batch: on made-up machines whose answer is known, and with real passes under a real limit."""

import random
from collections.abc import Callable

import pytest
import torch

from elite import checkpoint
from elite.attention import DOCUMENT_SDPA
from elite.executor.whole import WholeExecutor
from elite.training.batch_finder import PROBES, TOLERANCE, find
from elite.training.trial import Subject, Trial, attempt, one_pass
from tests.models import tiny


def machine(bytes_of: Callable[[int], float], limit: float) -> Callable[[int], Trial]:
    """Runs out of memory above the limit, as a device does."""

    def probe(sequences: int) -> Trial:
        needed = bytes_of(sequences)
        return Trial(sequences, bytes_of(0), min(needed, limit), 0.0, 1.0, needed > limit)

    return probe


@pytest.mark.parametrize("seed", range(200))
def test_it_lands_within_five_percent(seed: int) -> None:
    draw = random.Random(seed)
    resident, each, fixed = draw.uniform(0, 40), draw.uniform(0.02, 3), draw.uniform(0, 8)
    bend, curve = draw.randint(1, 60), draw.uniform(0, 2)

    def bytes_of(sequences: int) -> float:
        """Resident, a workspace that is there as soon as anything runs and grows up to a size, and so much a sequence."""
        return resident + bool(sequences) * fixed + each * sequences + curve * min(sequences, bend)

    most = draw.choice([8, 64, 1024])
    true = max((n for n in range(1, most + 1) if bytes_of(n) <= 80), default=0)
    found = find(machine(bytes_of, 80), round(true * draw.uniform(0.4, 2)) or 1, most, 80)
    assert found.largest <= true and found.largest >= (1 - TOLERANCE) * true
    assert len(found.trials) <= PROBES and len({trial.sequences for trial in found.trials}) == len(found.trials)


def test_a_guess_far_too_high_still_finds_something() -> None:
    found = find(machine(lambda n: 79.0 + n, 80), 4096, 4096, 80)
    assert found.largest == 1 and len(found.trials) <= PROBES and found.trials[-1].sequences == 1


def test_nothing_fits() -> None:
    found = find(machine(lambda n: 90.0 + n, 80), 4, 64, 80)
    assert found.largest == 0 and all(trial.out_of_memory for trial in found.trials)


def subject(limit: float, held: float = 0.0) -> Subject:
    model = tiny("llama", DOCUMENT_SDPA, hidden_size=64, intermediate_size=256, attention_dropout=0.0)
    executor = WholeExecutor(model, torch.float32)
    return Subject(executor, torch.float32, list(model.parameters()), 97, 64, torch.device("cpu"), limit, held)


def tried(one: Subject, sequences: int) -> Trial:
    return attempt(one, sequences, one_pass(one, sequences), gradients=True)


def test_real_passes_under_a_limit_land_on_the_true_largest() -> None:
    one = subject(limit=24e6)
    found = find(lambda n: tried(one, n), 3, 1000, 24e6)
    assert found.proven and len(found.trials) <= PROBES
    # The neighbours: all up to it fit; one that is above by more than the tolerance does not.
    assert tried(one, found.largest).fits(24e6)
    assert tried(one, int(found.largest / (1 - TOLERANCE)) + 1).out_of_memory
    assert any(trial.out_of_memory for trial in found.trials) and 10 < found.largest < 200


def test_what_is_set_aside_counts() -> None:
    free, held = (tried(subject(limit=1e9, held=aside), 4) for aside in (0.0, 5e6))
    assert held.peak_bytes == free.peak_bytes + 5e6 and held.resident_bytes == free.resident_bytes + 5e6


@pytest.mark.parametrize("limit", [1e9, 2e6])
def test_a_trial_leaves_no_trace(limit: float) -> None:
    one = subject(limit)
    one.trainable[0].grad = torch.ones_like(one.trainable[0])
    kept, before = one.trainable[0].grad, checkpoint.random_state()
    weights = [p.detach().clone() for p in one.trainable]
    assert tried(one, 16).out_of_memory == (limit == 2e6)
    assert one.trainable[0].grad is kept and bool((kept == 1).all())
    assert all(p.grad is None for p in one.trainable[1:])
    assert all(torch.equal(p, w) for p, w in zip(one.trainable, weights, strict=True))
    after = checkpoint.random_state()
    assert torch.equal(before["torch"], after["torch"]) and before["python"] == after["python"]


def test_an_error_that_is_not_about_memory_is_not_swallowed() -> None:
    def run() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        attempt(subject(1e9), 1, run, gradients=False)
