"""The bench of gradient errors of rows that ranks share: in fp32 all are within rounding of one rank's reference."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from elite.bench import gradients, ranks_gradients, text
from elite.compose import from_overrides
from elite.config import RunConfig
from elite.distributed.ranks import Ranks
from tests.distributed.forked import together

CONTEXT = 128


def compared(config: RunConfig, ranks: Ranks, _: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ranks_gradients.compare(config, torch.float32, 1, ranks)["runs"]
    return found


def test_ranks_together_have_one_ranks_gradients(tmp_path: Path, repository: Path, cache: Path) -> None:
    asked = ("debug=tiny", *gradients.ORDINARY, ranks_gradients.RING, "hardware=cpu", "hardware.gpus=2")
    config = text.at_context(from_overrides(*asked, f"data.repo={repository}", f"output.cache={cache}").config, CONTEXT)
    text.tokens(config)
    one, two = together(tmp_path / "ranks", 2, partial(compared, config))
    assert one == two
    for run, tensors in zip(one, (20, 28), strict=True):
        # Two layers: nine tensors each, final norm and embedding, which is the head; adapters: A and B of seven maps each.
        assert run["tensors"] == tensors
        assert set(run["ratios"]) == {"streamed", *(p.name for p in ranks_gradients.TOGETHER)}
        for found in (*run["alone"].values(), *run["ratios"].values()):
            assert 0 < found["worst_error"] <= 1e-5
            assert found["loss"] == pytest.approx(run["alone"]["whole"]["loss"], abs=1e-5)
        assert len({found["worst_error"] for found in run["ratios"].values()}) > 1, "passes that add up otherwise"
