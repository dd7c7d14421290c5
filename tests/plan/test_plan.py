import json
import math
from dataclasses import replace
from typing import Any

import pytest

from elite import geometry
from elite.config import Executor, RunConfig
from elite.errors import EliteError
from elite.facts import GIB, Device
from elite.plan import Plan, facts_of, make_plan, model_flops_per_token
from elite.streaming import Place
from tests.plan.helpers import CORPUS, STANDARD, device, phi2, run_config


def plan(config: RunConfig, machine: Device | None = None) -> Plan:
    return make_plan(config, machine or device("rtx3090"), phi2(), CORPUS)


def test_json_round_trip() -> None:
    made = plan(run_config())
    kept = json.loads(json.dumps(made.to_dict()))
    assert kept == made.to_dict()
    assert kept["corpus"]["train_tokens"] == CORPUS.train_tokens
    assert {"steps", "accumulation", "total_bytes", "step_s", "fits"} <= kept.keys()
    assert kept["decisions"][0]["name"] == "sequence_packing"


def test_fits_leaves_headroom() -> None:
    config = run_config()
    needed = plan(config).total_bytes
    limit = needed / (1 - config.plan.headroom_fraction)
    for spare, fits in ((1024, True), (-1024, False)):
        machine = replace(device("rtx3090"), memory_usable_bytes=int(limit + spare))
        assert plan(config, machine).fits == fits


def apply(config: RunConfig, fix: str) -> RunConfig:
    """The configuration with the proposed overrides."""
    changed: dict[str, dict[str, Any]] = {"optimizations": {}, "tier": {}, "training": {}}
    for word in fix.split():
        path, _, value = word.partition("=")
        group, _, name = path.partition(".")
        if group == "optimizations":
            name = name.removesuffix(".enabled")
            changed[group][name] = replace(getattr(config.optimizations, name), enabled=value == "true")
        elif group == "executor":
            chosen: dict[str, Any] = {"boundaries": Place(value)} if name == "boundaries" else {"name": Executor(value)}
            config = replace(config, executor=replace(config.executor, **chosen))
        else:
            changed[group][name] = int(value)
    return replace(config, **{group: replace(getattr(config, group), **fields) for group, fields in changed.items()})


@pytest.mark.parametrize(
    ("context", "on", "micro_batch", "usable_gib", "expected"),
    [
        (4096, STANDARD, 4, 12, "training.micro_batch=1"),
        (4096, STANDARD, 1, 9, "optimizations.fused_loss.enabled=true"),
        (4096, (*STANDARD, "fused_loss"), 1, 7, "optimizations.qlora.enabled=true"),
        (4096, ("mixed_precision", "flash_attention"), 1, 14, "optimizations.gradient_checkpointing.enabled=true"),
        (65536, (*STANDARD, "qlora", "adamw_8bit", "fused_loss", "tiled_mlp"), 1, 10, "executor=auto"),
        (16384, (*STANDARD, "qlora", "adamw_8bit"), 1, 1, "a smaller model, or "),
        (65536, (), 1, 22.5, "optimizations."),
    ],
)
def test_the_fix_makes_it_fit(context: int, on: tuple[str, ...], micro_batch: int, usable_gib: float, expected: str) -> None:
    config = run_config(context, on)
    config = replace(config, training=replace(config.training, micro_batch=micro_batch, global_batch_tokens=context * 4))
    machine = replace(device("rtx3090"), memory_usable_bytes=int(usable_gib * GIB))
    made = plan(config, machine)
    assert not made.fits
    assert made.fix.startswith(expected)
    if "smaller model" not in expected:
        assert plan(apply(config, made.fix), machine).fits


def test_boundaries_go_to_disk_where_the_host_has_no_room() -> None:
    config, machine = run_config(2**20, (*STANDARD, "fused_loss"), executor=Executor.auto), device("rtx3090")
    machine = replace(machine, host_ram_bytes=42 * GIB)
    made = plan(config, machine)
    assert not made.fits and "of host memory" in made.shortage
    assert made.fix == "executor.boundaries=disk" and plan(apply(config, made.fix), machine).fits


def test_batch_is_accumulated_to_the_global_tokens() -> None:
    made = plan(run_config(4096))
    assert (made.accumulation, made.step_tokens) == (16, 65536)
    assert made.steps == -(-CORPUS.train_tokens // 65536)
    assert made.run_s == made.steps * made.step_s
    two = plan(run_config(4096), replace(device("rtx3090"), count=2))
    assert (two.accumulation, two.step_tokens, two.ranks) == (8, 65536, 2)


def test_a_context_longer_than_the_batch_is_one_sequence_a_rank() -> None:
    made = plan(run_config(131072))
    assert (made.accumulation, made.step_tokens) == (1, 131072)
    assert "training.global_batch_tokens=65536 is less than one micro-batch" in made.warnings[0]


def test_max_steps_and_epochs() -> None:
    config = run_config()
    assert plan(replace(config, training=replace(config.training, max_steps=7))).steps == 7
    assert plan(replace(config, training=replace(config.training, epochs=2.0))).steps == -(-2 * CORPUS.train_tokens // 65536)


def test_a_corpus_shorter_than_a_sequence_is_a_warning() -> None:
    made = make_plan(run_config(8192), device("rtx3090"), phi2(), replace(CORPUS, train_tokens=100))
    assert any("the corpus has 100 tokens, less than one sequence" in warning for warning in made.warnings)
    assert made.steps == 1


def test_positions_beyond_the_trained_ones_are_named() -> None:
    assert "trained positions" in plan(run_config(2048)).positions
    doubled = plan(run_config(4096))
    assert doubled.positions.startswith("YaRN factor 2")
    assert not any("YaRN" in warning for warning in doubled.warnings)
    assert any("YaRN factor 32" in warning for warning in plan(run_config(65536)).warnings)


def test_a_models_own_rotary_scaling_is_kept() -> None:
    config = run_config(262144, model="llama31_8b")
    made = make_plan(config, device("h200"), geometry.shape(config.model), CORPUS)
    assert "own rotary scaling" in made.positions
    assert any("positions beyond the trained ones" in warning for warning in made.warnings)


def test_an_absent_card_and_dropout_are_warned_of() -> None:
    config = run_config()
    made = plan(replace(config, adapter=replace(config.adapter, dropout=0.1)))
    assert any("not in this machine" in warning for warning in made.warnings)
    assert any("adapter.dropout=0.1" in warning for warning in made.warnings)


def test_a_request_that_cannot_act_says_why() -> None:
    machine = replace(device("cpu"), supports_bf16=False)
    switch = next(s for s in plan(run_config(), machine).decisions if s.name == "mixed_precision")
    assert (switch.requested, switch.active) == (True, False)
    assert "bf16" in switch.reason


def test_a_checkpoint_holds_adapters_and_optimizer_state() -> None:
    made = plan(run_config())
    assert made.checkpoint_bytes == 12 * made.trainable_params


@pytest.mark.parametrize(
    ("group", "field", "value", "problem"),
    [
        ("tier", "context", 4100, "tier.context=4100: must be a multiple of 8"),
        ("tier", "context", 32, "at least 64"),
        ("tier", "target_length", 4096, "tier.target_length=4096 leaves no context"),
        ("tier", "target_length", 0, "tier.target_length=0: must be at least 2"),
        ("training", "global_batch_tokens", 10000, "training.global_batch_tokens=10000 is not a multiple"),
        ("training", "learning_rate", 0.0, "training.learning_rate=0.0: must be positive"),
        ("training", "micro_batch", 0, "training.micro_batch=0"),
        ("training", "max_steps", 0, "training.max_steps=0"),
        ("training", "epochs", -1.0, "training.epochs=-1.0"),
        ("training", "beta2", 1.0, "training.beta2=1.0"),
        ("training", "weight_decay", -0.1, "training.weight_decay=-0.1: must not be negative"),
        ("adapter", "rank", 0, "adapter.rank=0"),
        ("plan", "headroom_fraction", 1.5, "plan.headroom_fraction=1.5"),
    ],
)
def test_impossible_numbers_are_refused(group: str, field: str, value: float, problem: str) -> None:
    config = run_config()
    changed = replace(config, **{group: replace(getattr(config, group), **{field: value})})
    with pytest.raises(EliteError, match=problem) as caught:
        plan(changed)
    assert caught.value.remedy
    assert len(str(caught.value).splitlines()) <= 3


def test_time_is_told_in_full() -> None:
    config, card = run_config(4096), device("h100")
    made = make_plan(config, card, phi2(), CORPUS)
    assert sum(made.time.values()) == pytest.approx(made.step_s)
    assert made.tokens_per_s == pytest.approx(made.step_tokens / made.step_s)
    assert made.epoch_s == pytest.approx(made.step_s * math.ceil(CORPUS.train_tokens / made.step_tokens))
    facts = facts_of(config, card, phi2())
    assert made.mfu == pytest.approx(model_flops_per_token(facts) * made.tokens_per_s / card.matmul_flops_per_s)
    assert 0.05 < made.mfu < 0.65
    assert made.rates == "the data sheet"


def test_a_disk_too_small_is_said() -> None:
    config = run_config(65536, executor=Executor.streamed)
    config = replace(config, executor=replace(config.executor, boundaries=Place.disk))
    here = replace(device("rtx3090"), present=True)
    small, large = (make_plan(config, replace(here, disk_free_bytes=free), phi2(), CORPUS) for free in (10**9, 10**15))
    assert any("of disk, 0.93 GiB are free" in warning for warning in small.warnings)
    assert not any("of disk" in warning for warning in large.warnings)


def test_a_checkpoint_that_the_host_cannot_hold_meanwhile_is_a_warning() -> None:
    config, machine = run_config(), device("rtx3090")
    made = plan(config, machine)
    assert not any("a checkpoint is" in warning for warning in made.warnings)
    spare = int(machine.host_ram_bytes - made.host_usable_bytes)
    for more, warned in ((1024, False), (-1024, True)):
        small = replace(machine, host_ram_bytes=spare + int(made.host_bytes + made.checkpoint_bytes) + more)
        assert any("of host memory while it is written" in warning for warning in plan(config, small).warnings) == warned
