"""Flags of backends: set, given back, and only where there is something to set."""

from dataclasses import replace

import pytest
import torch

from elite.compose import from_overrides
from elite.errors import ConfigError
from elite.optimizations.backend_flags import BackendFlags
from tests.optimizations.test_all import FACTS


def flags() -> tuple[bool, ...]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("tf32", "benchmark", "count"), [(True, True, 3), (True, False, 2), (False, True, 1)])
def test_flags_are_set_and_given_back(tf32: bool, benchmark: bool, count: int) -> None:
    before = flags()
    applied = BackendFlags(BackendFlags.Config(True, tf32, benchmark)).apply(None)
    assert applied.count == count
    assert flags() == (tf32 or before[0], tf32 or before[1], benchmark or before[2])
    assert applied.undo is not None
    applied.undo()
    assert flags() == before


def test_it_says_where_it_cannot_act() -> None:
    part = BackendFlags(BackendFlags.Config(True))
    assert "CPU" in str(part.check(FACTS))
    for capability, reason in (((7, 5), "has 7.5"), ((8, 0), None), ((9, 0), None)):
        said = part.check(replace(FACTS, device=replace(FACTS.device, kind="cuda", compute_capability=capability)))
        assert said is None if reason is None else reason in str(said)
    with pytest.raises(ConfigError, match="neither tf32 nor cudnn_benchmark"):
        from_overrides(*(f"optimizations.backend_flags.{word}" for word in ("enabled=true", "tf32=false", "cudnn_benchmark=false")))


@pytest.mark.gpu
def test_fp32_products_round_to_tf32() -> None:
    one, two = (torch.randn(1024, 1024, device="cuda") for _ in range(2))
    exact = one.double() @ two.double()
    applied = BackendFlags(BackendFlags.Config(True)).apply(None)
    assert applied.undo is not None
    rounded = (one @ two - exact).norm() / exact.norm()
    applied.undo()
    plain = (one @ two - exact).norm() / exact.norm()
    assert plain < 1e-6 < 1e-4 < rounded < 2e-3
