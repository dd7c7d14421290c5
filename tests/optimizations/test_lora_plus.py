"""LoRA+: B's rate is a multiple of A's, under every optimizer and schedule."""

from dataclasses import replace

import pytest
import torch

from elite.config import Schedule, ScheduleConfig, TrainingConfig
from elite.optimizations import OptimizationsConfig, decide
from elite.optimizations.adamw_8bit import AdamW8bit
from elite.optimizations.lora_plus import LoRAPlus
from elite.training.optimizer import build_optimizer
from elite.training.schedules import schedule
from tests.optimizations.test_all import FACTS
from tests.training.rig import adapted

CONFIG = replace(OptimizationsConfig(), lora_plus=LoRAPlus.Config(enabled=True, ratio=8.0))


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("name", list(Schedule))
def test_every_b_learns_ratio_times_as_fast_as_every_a(name: Schedule, eight_bit: bool) -> None:
    loaded = adapted("llama", rank=64)
    switches = replace(CONFIG, adamw_8bit=AdamW8bit.Config(enabled=eight_bit))
    training = TrainingConfig(weight_decay=0.1)
    optimizer, applied = build_optimizer(loaded.trainable, 1e-3, training, decide(switches, FACTS), loaded.model)
    assert ("adamw_8bit" in applied) is eight_bit and type(optimizer).__name__ == ("AdamW8bit" if eight_bit else "AdamW")
    names = {id(parameter): name for name, parameter in loaded.model.named_parameters()}
    scheduler = schedule(optimizer, ScheduleConfig(name=name, final_fraction=0.1), 10)
    for _ in range(9):
        slow, fast = (
            {group["lr"] for group in optimizer.param_groups for p in group["params"] if part in names[id(p)]}
            for part in ("lora_A", "lora_B")
        )
        (a,), (b,) = slow, fast
        assert b == pytest.approx(8 * a)
        for parameter in loaded.trainable:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(map(id, loaded.trainable)) and all(group["weight_decay"] == 0.1 for group in optimizer.param_groups)
    assert applied["lora_plus"].count == len(loaded.trainable) // 2


def test_it_says_why_it_is_inactive() -> None:
    (decision,) = (d for d in decide(CONFIG, replace(FACTS, adapter="full")) if d.name == "lora_plus")
    assert not decision.active and "adapter.method=lora" in decision.reason
