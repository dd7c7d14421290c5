"""Paged 8-bit AdamW: what leaves the device in the plan, and why it stays out on a CPU."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from elite import geometry
from elite.facts import Facts
from elite.optimizations.adamw_8bit import MIN_PAGED_ELEMENTS, STATE_BYTES, AdamW8bit
from elite.plan.memory import host, predict, unoptimized
from elite.training.telemetry import paged_bytes
from tests.optimizations.test_all import FACTS, Decision
from tests.plan.helpers import device, model_config

PAGED = AdamW8bit(AdamW8bit.Config(enabled=True, paged=True))
PLAIN = AdamW8bit(AdamW8bit.Config(enabled=True))


def trained(rank: int | None) -> tuple[Facts, list[int]]:
    """Facts of SmolLM2 on a GPU, and the sizes of what is trained, read off the model built without memory."""
    config = model_config("smollm2_135m")
    shape = geometry.shape(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(geometry.hf_config(config))
        if rank:
            model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return Facts(shape, device("rtx3090"), 4096, 1, sum(sizes), "lora" if rank else "full"), sizes


@pytest.mark.parametrize("rank", [8, 100, 256, None])
def test_the_plan_moves_what_the_library_pages(rank: int | None) -> None:
    facts, sizes = trained(rank)
    large = sum(size for size in sizes if size >= MIN_PAGED_ELEMENTS)
    on_host = host(facts, (Decision(PAGED, True, True, ""),))
    assert on_host == pytest.approx(STATE_BYTES * large, rel=1e-6)
    assert (on_host > 0) is (rank != 8)
    apart, together = (predict(facts, (Decision(kind, True, True, ""),)).optimizer_state for kind in (PAGED, PLAIN))
    assert apart + on_host == pytest.approx(together)
    assert PLAIN.host_memory(unoptimized(facts), facts) == 0


def test_on_a_cpu_it_says_why_not() -> None:
    facts, _ = trained(64)
    on_cpu = replace(facts, device=FACTS.device)
    assert "CUDA" in str(PAGED.check(on_cpu)) and PLAIN.check(on_cpu) is None
    assert PAGED.check(replace(facts, device=device("rtx3090"))) is None


def test_it_needs_tensors_that_the_library_packs() -> None:
    assert "4,096 elements" in str(PLAIN.check(replace(FACTS, trainable_params=FACTS.model.lora_params(16))))


@pytest.mark.gpu
def test_large_states_are_paged_also_after_a_checkpoint() -> None:
    from elite.optimizations.functions.paged import PagedState

    def stepped(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return [parameter.detach().cpu() for parameter in parameters]

    def made() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = [torch.nn.Parameter(torch.ones(512, 512, device="cuda")), torch.nn.Parameter(torch.ones(64, 64, device="cuda"))]
        return parameters, PagedState(parameters, lr=1e-2)

    one, first = made()
    stepped(one, first)
    assert paged_bytes(first) == 2 * 512 * 512
    two, second = made()
    with torch.no_grad():
        for copy, parameter in zip(two, one, strict=True):
            copy.copy_(parameter)
    second.load_state_dict(first.state_dict())
    assert paged_bytes(second) == 2 * 512 * 512
    assert all(torch.equal(a, b) for a, b in zip(stepped(one, first), stepped(two, second), strict=True))
