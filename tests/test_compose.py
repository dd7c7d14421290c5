"""Every shipped YAML composes and plans; presets follow tiers; mistakes are explained."""

from dataclasses import FrozenInstanceError, replace
from functools import cache

import pytest
from omegaconf import OmegaConf

from elite import compose, config, geometry, hardware, schema
from elite.errors import ConfigError, EliteError
from elite.facts import Corpus
from elite.optimizations import ALL
from elite.optimizations.contract import Stage
from elite.optimizations.zero_3 import ZeRO3
from elite.plan import make_plan, render

CORPUS = Corpus("a repository", 900, 100, 90_000_000, 10_000_000, 300_000_000, "exact", {"binary": 3})
GROUPS = (
    "tier",
    "hardware",
    "optimizations",
    "curriculum",
    "schedule",
    "executor",
    "model",
    "data",
    "logger",
    "experiment",
    "hparams_search",
    "debug",
)
EVERY_YAML = [(group, option) for group in GROUPS if group != "hparams_search" for option in compose.options(group)]
"""A search needs a plugin of Hydra's (tests/test_hparams_search.py)."""


def test_no_group_is_forgotten() -> None:
    assert sorted(folder.name for folder in config.CONF_DIR.iterdir() if folder.is_dir()) == sorted(GROUPS)


@pytest.mark.parametrize(("group", "option"), EVERY_YAML, ids=lambda value: value)
def test_every_yaml_composes_and_plans(group: str, option: str) -> None:
    made = compose.from_overrides(f"{group}={option}").config
    if group not in ("experiment", "debug", "data", "optimizations", "model", "curriculum"):
        name = getattr(made, group).name
        assert getattr(name, "value", name) == option
    plan = make_plan(made, hardware.device(made.hardware), geometry.shape(made.model), CORPUS)
    assert plan.steps > 0 and plan.total_bytes > 0


@cache
def of_tier(tier: str) -> config.RunConfig:
    return compose.from_overrides(f"tier={tier}", "executor=whole").config


LIKE_OTHERS = ("rtx3060", "rtx4090", "a100_40gb", "a100_80gb", "h200")
"""Cards that differ from others of the same kind in nothing but their numbers."""


@pytest.mark.parametrize(
    "card", [pytest.param(card, marks=[pytest.mark.slow] * (card in LIKE_OTHERS)) for card in compose.options("hardware")]
)
def test_every_tier_plans_on_every_card(card: str) -> None:
    on_card = compose.from_overrides(f"hardware={card}").config.hardware
    totals = []
    for tier in config.TIERS:
        made = replace(of_tier(tier), hardware=on_card)
        plan = make_plan(made, hardware.device(made.hardware), geometry.shape(made.model), CORPUS)
        assert plan.to_dict()["tier"] == tier and render(plan)
        assert plan.fits == (plan.fix == "") and sum(plan.memory.values()) == pytest.approx(plan.total_bytes)
        totals.append(plan.total_bytes)
    assert not plan.fits, "4M tokens fit nowhere without streaming"
    assert totals[:7] == sorted(totals[:7]) and totals[7:] == sorted(totals[7:]), "longer contexts need more, preset for preset"


def test_tiers_double_from_4k_to_4m() -> None:
    made = [compose.from_overrides(f"tier={tier}").config.tier for tier in config.TIERS]
    assert [tier.context for tier in made] == [4096 << n for n in range(11)]
    assert [tier.target_length for tier in made] == [min(tier.context // 8, 16384) for tier in made]


def test_high_tiers_bring_the_extreme_preset_and_the_command_line_wins() -> None:
    assert compose.from_overrides("tier=tier9", "hardware=rtx3090").config.optimizations.preset == "extreme"
    assert compose.from_overrides("tier=tier7").config.optimizations.preset == "standard"
    assert compose.from_overrides("tier=tier9", "optimizations=none").config.optimizations.preset == "none"
    made = compose.from_overrides("tier=tier9", "optimizations.qlora.enabled=false").config.optimizations
    assert made.adamw_8bit.enabled and not made.qlora.enabled


def test_presets_hold_what_they_say() -> None:
    def active(preset: str) -> set[str]:
        made = compose.from_overrides(f"optimizations={preset}").config.optimizations
        return {kind.name for kind in ALL if getattr(made, kind.name).enabled}

    # Some take the place of another, one of them needs a package of its own, two several ranks; the others change the model, how it
    # learns, or flags. What acts around steps but divides memory among ranks is in.
    beside = {"checkpoint_offload", "activation_quantization", "liger_kernels", "torch_compile", "backend_flags", "lora_plus"}
    beside |= {"ring_attention", "tensor_parallel"}
    beside |= {kind.name for kind in ALL if kind.stage in (Stage.loop, Stage.geometry) and kind is not ZeRO3}
    assert active("none") == set() < active("standard") < active("extreme") == {kind.name for kind in ALL} - beside


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tier=tier99"], ("tier=tier99 is unknown", "did you mean tier9")),
        (["hardware=rtx3091"], ("hardware=rtx3091 is unknown", "rtx3090")),
        (["tier.contxt=4096"], ("tier.contxt is not a field", "tier.context")),
        (["modle=phi2"], ("modle is not a field or group", "model")),
        (["training.learning_rate=fast"], ("training.learning_rate=fast", "could not be converted to Float")),
        (["tier.context=8k"], ("tier.context=8k", "Integer")),
        (["mode=trian"], ("mode=trian", "train")),
        (["optimizations.qlora.enabled=maybe"], ("optimizations.qlora.enabled=maybe", "bool")),
        (["data.unit=folder"], ("data.unit=folder", "repository")),
        (["training.max_steps=[1"], ("training.max_steps=[1", "quote")),
        (["schedule.name=cosin"], ("schedule.name=cosin", "cosine")),
        (["executor.name=fast"], ("executor.name=fast", "whole")),
        (["logger.name=tensorboard"], ("logger.name=tensorboard", "wandb")),
    ],
)
def test_mistakes_are_explained_in_two_lines(overrides: list[str], words: tuple[str, ...]) -> None:
    with pytest.raises(Exception) as caught:
        compose.from_overrides(*overrides)
    error = compose.explain(caught.value)
    assert isinstance(error, ConfigError) and error.exit_code == 2
    assert len(str(error).splitlines()) <= 3
    for word in words:
        assert word in str(error)


def test_the_configuration_survives_its_yaml(tmp_path: object) -> None:
    from pathlib import Path

    made = compose.from_overrides("experiment=quickstart", "data.exclude=[a/*,b]", "model.path=x y").config
    path = Path(str(tmp_path)) / "config.yaml"
    path.write_text(schema.to_yaml(made))
    assert schema.from_yaml(path) == made


def test_every_field_says_what_it_is() -> None:
    """A field is documented by the string below it, or its class says it all."""
    import ast
    import inspect

    for node in ast.parse(inspect.getsource(config)).body:
        if isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), node.name


def test_frozen() -> None:
    made = compose.from_overrides().config
    with pytest.raises(FrozenInstanceError):
        made.seed = 1  # type: ignore[misc]
    assert OmegaConf.to_yaml(OmegaConf.structured(made))


def test_errors_survive_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(EliteError("value breaks rule", "do this")))
    assert str(error) == "value breaks rule\n  remedy: do this"
