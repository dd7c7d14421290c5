"""Draws are the same for everyone, fit, and reach over everything that they should."""

import json
from dataclasses import replace

import pytest

from elite import geometry
from elite.bench.calibrate.sample import CPU, GPU, HOST_BYTES, SETS, Drawn, draw, reference_seconds, stand_in
from elite.compose import from_overrides
from elite.errors import ConfigError
from elite.plan.executors import choose_executor

COUNT = 9
pytestmark = pytest.mark.xdist_group("draw")


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    return draw(5, COUNT)


def test_a_seed_decides(drawn: list[Drawn]) -> None:
    assert draw(5, COUNT) == drawn
    assert [Drawn.from_dict(json.loads(json.dumps(one.to_dict()))) for one in drawn] == drawn
    assert SETS["fit"] != SETS["held_out"]


def test_everything_drawn_fits_and_is_short(drawn: list[Drawn]) -> None:
    for one in drawn:
        config = from_overrides(*one.overrides).config
        shape, machine = geometry.shape(config.model), stand_in(config, "h100")
        made = choose_executor(config, machine, shape, 1)
        assert made.fits and machine.present and made.executor is config.executor.name
        assert made.host_bytes <= HOST_BYTES
        assert reference_seconds(shape, config.tier.context, int(config.training.micro_batch)) <= GPU.limit_s(config.tier.context)
        assert 2048 <= config.tier.context <= 524_288 and config.tier.context % 256 == 0


def test_a_draw_reaches_over_its_space(drawn: list[Drawn]) -> None:
    words = [set(one.overrides) for one in drawn]
    for model in GPU.models:
        assert sum(f"model={model}" in one for one in words) == COUNT // 3
    assert {word for one in words for word in one if word.startswith("executor=")} == {"executor=whole", "executor=streamed"}
    contexts = sorted(from_overrides(*one.overrides).config.tier.context for one in drawn)
    # A share for each: at most those that are too long for their model are drawn anew.
    assert contexts[0] < 4096 and contexts[COUNT // 2] > 8192 and contexts[-1] > 65_536


def test_a_smaller_card_draws_what_fits_it() -> None:
    small = draw(5, 3, card="rtx3060")
    for one in small:
        config = from_overrides(*one.overrides).config
        machine = stand_in(config, "rtx3060")
        assert machine.present and machine.memory_usable_bytes < 12 * 2**30
        assert choose_executor(config, machine, geometry.shape(config.model), 1).fits
        # No cap beyond the card itself.
        assert config.hardware.name in ("auto", "rtx2060s", "rtx3060")
    with pytest.raises(ConfigError, match="no hardware preset"):
        draw(5, 1, card="rtx9090")


def test_one_layer_by_hand() -> None:
    shape = replace(geometry.shape(from_overrides("model=qwen25_coder_1_5b").config.model), num_hidden_layers=1)
    # 46,792,704 weights a layer and a head of 1536 × 151,936, eight operations each; attention of 12 heads of 128: 9 · 1536 a pair.
    expected = 2 * 1000 * (8 * (46_792_704 + 1536 * 151_936) + 9 * 1536 * 1000) / 4e14
    assert reference_seconds(shape, 1000, 2) == pytest.approx(expected)


def test_what_a_cpu_draws_is_tiny() -> None:
    for one in draw(1, 3, CPU):
        assert geometry.shape(from_overrides(*one.overrides).config.model).total_params < 1e6
