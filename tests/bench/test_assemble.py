"""What a bench assembles acts as in a run, the loop's parts included."""

import math
from pathlib import Path

import pytest
import torch

from elite.bench.assemble import assembled
from elite.compose import from_overrides


def test_parts_of_the_loop_act(tmp_path: Path) -> None:
    on = ("kernel_warmup", "ema", "gradient_noise")
    switches = [f"optimizations.{name}.enabled=true" for name in on]
    config = from_overrides("debug=tiny", "hardware=cpu", f"output.cache={tmp_path}", *switches).config
    torch.manual_seed(0)
    with assembled(config) as made:
        assert all(parameter.grad is None for parameter in made.loaded.trainable), "a rehearsal leaves no trace"
        steps = [made.step() for _ in range(2)]
        counts = {hook.name: hook.counts() for hook in made.hooks}
    assert len(steps) == 2 and counts.keys() == set(on)
    assert counts["kernel_warmup"]["passes"] == 1 and counts["kernel_warmup"]["pass_s"] > 0
    assert counts["ema"]["updates"] == 2 and all(
        step["loss"] == pytest.approx(math.log(config.model.vocab_size), abs=0.5) for step in steps
    )
