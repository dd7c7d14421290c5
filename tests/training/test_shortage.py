"""What is proposed when memory ran out although the plan said that it would not."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from elite.facts import GIB
from elite.plan import make_plan
from elite.training.shortage import Actual, actual, breakdown, requested_bytes, smaller
from tests.models import tiny
from tests.plan.helpers import CORPUS, STANDARD, device, phi2, run_config
from tests.plan.test_plan import apply


@pytest.mark.parametrize("over", [1.02, 1.2, 1.6])
def test_the_change_lowers_the_plan_by_what_was_missing(over: float) -> None:
    config, machine = run_config(8192, (*STANDARD, "fused_loss")), device("rtx3090")
    config = replace(config, training=replace(config.training, micro_batch=2))
    before = make_plan(config, machine, phi2(), CORPUS)
    assert before.fits and before.fix == ""
    change = smaller(config, machine, phi2(), before.total_bytes, 10 * GIB, over * 10 * GIB)
    after = make_plan(apply(config, change), machine, phi2(), CORPUS)
    assert after.total_bytes <= before.total_bytes / over and after.total_bytes <= 0.95 * before.total_bytes


def test_where_nothing_helps_it_says_how_much_it_takes() -> None:
    config, machine = run_config(4096, (*STANDARD, "fused_loss")), device("rtx3090")
    assert "a smaller model, or" in smaller(config, machine, phi2(), 8 * GIB, GIB, 100 * GIB)


def test_what_a_process_holds_is_read_off_its_tensors() -> None:
    model = tiny("llama")
    weights = sum(p.nbytes for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    found = actual("Tried to allocate 20.00 MiB", model, optimizer, torch.device("cpu"))
    counters = 4 * len(list(model.parameters()))
    assert (found.weights, found.gradients, found.optimizer_state) == (weights, weights, 2 * weights + counters)
    assert found.requested == 20 * 2**20 and found.allocated > weights and found.device_free > 0


def test_the_breakdown_shows_planned_and_actual() -> None:
    planned = make_plan(run_config(), device("rtx3090"), phi2(), CORPUS).memory
    console = Console(width=100)
    with console.capture() as captured:
        console.print(breakdown(planned, 20 * GIB, Actual(6 * GIB, GIB, 2 * GIB, 19 * GIB, 19.5 * GIB, 1.5 * GIB, 0)))
    shown = captured.get()
    for words in ("weights", "6.00 GiB", "optimizer state", "2.00 GiB", "reserved by the allocator", "19.50 GiB", "refused", "1.50 GiB"):
        assert words in shown
    assert "free on the device" not in shown


def test_requests_in_the_words_of_allocators() -> None:
    assert requested_bytes("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity") == 1.5 * GIB
    assert requested_bytes("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12") == 4096
    assert requested_bytes("cudaErrorMemoryAllocation") == 0
