"""The runs of an ablation: which there are, what each changes, and which of them would show nothing."""

from dataclasses import replace

import pytest

from elite import ablation, compose, geometry, hardware
from elite.ablation import AblationKind
from elite.config import RunConfig
from elite.errors import ConfigError, InapplicableError
from elite.plan.ablated import active_parts, require_variation
from elite.runfolder import request_key


def enabled(config: RunConfig) -> set[str]:
    return {name for name in ablation.NAMES if getattr(config.optimizations, name).enabled}


def varied(variant: str, *overrides: str) -> RunConfig:
    return compose.from_overrides("tier=tier1", "optimizations=standard", f"ablation.variant={variant}", *overrides).config


def test_variants_change_what_they_say() -> None:
    standard = enabled(compose.from_overrides("tier=tier1", "optimizations=standard").config)
    assert "fused_loss" in standard and "qlora" not in standard
    assert enabled(varied("all")) == standard and enabled(varied("none")) == set()
    assert enabled(varied("without_fused_loss")) == standard - {"fused_loss"}
    assert enabled(varied("only_fused_loss")) == {"fused_loss"}
    one = varied("only_qlora")
    assert ablation.varied(one.optimizations, "only_qlora") == one.optimizations, "a run that continues reads what was varied before"
    with pytest.raises(ConfigError, match="did you mean without_qlora"):
        varied("without_qlor")


def test_options_of_a_part_stay() -> None:
    tiled = varied("only_tiled_mlp", "optimizations.tiled_mlp.tile=64").optimizations.tiled_mlp
    assert tiled == replace(tiled, enabled=True) and getattr(tiled, "tile", None) == 64


def test_baselines_come_first() -> None:
    parts = ["fused_loss", "qlora"]
    made = ablation.variants(AblationKind.both, parts)
    assert made == ["all", "without_fused_loss", "without_qlora", "none", "only_fused_loss", "only_qlora"]
    assert ablation.variants(AblationKind.leave_one_out, parts) + ablation.variants(AblationKind.one_at_a_time, parts) == made
    for variant in made:
        assert made.index(ablation.baseline_of(variant)) <= made.index(variant)
    assert [ablation.part_of(variant) for variant in made] == [None, *parts, None, *parts]


def test_the_kind_does_not_make_another_run() -> None:
    one, two = (varied("without_fused_loss", f"ablation.kind={kind}") for kind in ("both", "leave_one_out"))
    assert request_key(one, "here") == request_key(two, "here") != request_key(varied("all"), "here")


def test_what_does_not_act_is_not_run() -> None:
    config = varied("without_qlora", "adapter.method=full", "hardware=rtx3090")
    device, shape = hardware.device(config.hardware), geometry.shape(config.model)
    with pytest.raises(InapplicableError, match=r"without_qlora: qlora does not act here, .*adapter.method=lora"):
        require_variation(config, device, shape)
    acting = varied("without_fused_loss", "hardware=rtx3090")
    require_variation(acting, device, shape)
    assert "fused_loss" not in active_parts(acting, device, shape)
    assert "fused_loss" in active_parts(varied("all", "hardware=rtx3090"), device, shape)
    with pytest.raises(ConfigError, match="compares several runs"):
        require_variation(compose.from_overrides("experiment=ablation").config, device, shape)
