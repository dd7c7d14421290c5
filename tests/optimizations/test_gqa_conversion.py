"""Fewer key/value heads: what is pooled, what alignment may turn, what a run exports and trains."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from elite import geometry
from elite.attention import DOCUMENT_EAGER
from elite.compose import from_overrides
from elite.config import RunConfig
from elite.errors import ConfigError, ModelError, PlanError
from elite.facts import NO_CORPUS
from elite.model import LoadedModel, _train_converted, apply_stage, copy_trained, load_trained
from elite.optimizations import OptimizationsConfig, decide, reshaped
from elite.optimizations.contract import Stage
from elite.optimizations.gqa_conversion import GQAConversion, HeadInit
from elite.plan import make_plan
from elite.plan.batch import facts_of
from elite.plan.time import step_flops
from tests.conftest import Trained
from tests.models import tiny
from tests.optimizations.test_all import FACTS
from tests.plan import steps
from tests.plan.helpers import device
from tests.plan.steps import Case

IDS = torch.arange(30)[None]
FLASH = ("flash_attention",)
CHECKPOINTED = ("mixed_precision", *FLASH, "gradient_checkpointing", "fused_loss")
CONVERT = ("optimizations.gqa_conversion.enabled=true", "optimizations.gqa_conversion.kv_heads=1")


def convert(model: Any, kv_heads: int, init: str = "mean") -> Any:
    applied = GQAConversion(GQAConversion.Config(True, kv_heads, HeadInit(init))).apply(model)
    assert applied.count == 2 * len(model.get_decoder().layers)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, documents=((30,),), use_cache=False).logits
    return found


def heads(projection: Any, width: int) -> Tensor:
    """Weight and bias as [heads, D, d + 1]."""
    bias = projection.bias if projection.bias is not None else torch.zeros(len(projection.weight))
    found: Tensor = torch.cat([projection.weight, bias[:, None]], 1).detach().unflatten(0, (-1, width))
    return found


def randomised(kind: str, **changes: Any) -> Any:
    """A model whose biases count, too."""
    model = tiny(kind, **changes)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def set_heads(projection: Any, found: Tensor) -> None:
    projection.weight.data.copy_(found[..., :-1].flatten(0, 1))
    if projection.bias is not None:
        projection.bias.data.copy_(found[..., -1].flatten())


@pytest.mark.parametrize("init", ["mean", "aligned"])
@pytest.mark.parametrize(("kind", "kv_heads"), [("phi", 2), ("llama", 1), ("qwen2", 1), ("qwen3", 1)])
def test_groups_of_identical_heads_convert_exactly(kind: str, kv_heads: int, init: str) -> None:
    model = randomised(kind)
    for layer in model.get_decoder().layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            first = heads(projection, layer.self_attn.head_dim).unflatten(0, (kv_heads, -1))[:, :1]
            set_heads(projection, first.expand(-1, model.config.num_key_value_heads // kv_heads, -1, -1).flatten(0, 1))
    before = logits(model)
    after = logits(convert(model, kv_heads, init))
    assert model.config.num_key_value_heads == kv_heads
    assert torch.allclose(after, before, atol=1e-5)


@pytest.mark.parametrize(("kind", "kv_heads"), [("phi", 2), ("llama", 1), ("qwen2", 1)])
def test_the_mean_is_the_mean(kind: str, kv_heads: int) -> None:
    model, converted = randomised(kind), convert(randomised(kind), kv_heads)
    for one, two in zip(model.get_decoder().layers, converted.get_decoder().layers, strict=True):
        for name in ("k_proj", "v_proj"):
            whole = heads(getattr(one.self_attn, name), 8).numpy()
            groups = whole.shape[0] // kv_heads
            expected = np.stack([whole[g * groups : (g + 1) * groups].sum(0) / groups for g in range(kv_heads)])
            assert np.allclose(heads(getattr(two.self_attn, name), 8).numpy(), expected, atol=1e-6)


def turned(model: Any, kv_heads: int, keys: bool) -> Any:
    """Heads of a group made copies of each other, turned at random: values anyhow, keys as rotary embedding allows."""
    torch.manual_seed(2)
    width = 8
    rotary = int(width * model.config.rope_parameters.get("partial_rotary_factor", 1.0))
    for layer in model.get_decoder().layers:
        for projection in (layer.self_attn.v_proj, *((layer.self_attn.k_proj,) if keys else ())):
            found = heads(projection, width)
            size = len(found) // kv_heads
            for head in range(len(found)):
                turn = torch.linalg.qr(torch.randn(width, width))[0]
                if projection is layer.self_attn.k_proj:
                    turn = torch.block_diag(torch.zeros(rotary, rotary), torch.linalg.qr(torch.randn(width - rotary, width - rotary))[0])
                    for i, angle in enumerate(torch.rand(rotary // 2) * 6):
                        j = i + rotary // 2
                        turn[i, i] = turn[j, j] = angle.cos()
                        turn[i, j], turn[j, i] = -angle.sin(), angle.sin()
                found[head] = turn @ found[head - head % size]
            set_heads(projection, found)
    return model


@pytest.mark.parametrize(("kind", "kv_heads"), [("phi", 2), ("phi", 1), ("llama", 1), ("qwen2", 1)])
def test_turned_copies_align_exactly(kind: str, kv_heads: int) -> None:
    """Rotary embedding of the whole head and of half of it, with biases and without."""
    before = logits(turned(randomised(kind), kv_heads, keys=True))
    aligned, mean = (logits(convert(turned(randomised(kind), kv_heads, keys=True), kv_heads, init)) for init in ("aligned", "mean"))
    assert torch.allclose(aligned, before, atol=1e-4)
    assert (mean - before).norm() > 100 * (aligned - before).norm()


def test_keys_behind_a_norm_stay_as_they_are() -> None:
    before = logits(turned(tiny("qwen3"), 1, keys=False))
    model = turned(tiny("qwen3"), 1, keys=False)
    keys = heads(model.get_decoder().layers[0].self_attn.k_proj, 8)
    convert(model, 1, "aligned")
    assert torch.allclose(heads(model.get_decoder().layers[0].self_attn.k_proj, 8)[0], keys.mean(0), atol=1e-6)
    assert not torch.allclose(logits(model), before, atol=1e-3)


@pytest.mark.parametrize("kind", ["phi", "llama", "qwen2"])
def test_the_plan_sees_the_converted_model(kind: str) -> None:
    model = convert(tiny(kind), 1)
    config = from_overrides("debug=tiny", "optimizations=none", "executor=whole").config
    wanted = replace(config, optimizations=replace(config.optimizations, gqa_conversion=GQAConversion.Config(True, 1)))
    loaded = geometry._shape(kind, tiny(kind).config.to_json_string(use_diff=False))
    expected = geometry._shape(kind, model.config.to_json_string(use_diff=False))
    shape = reshaped(wanted.optimizations, loaded)
    assert replace(shape, loaded=None) == expected and shape.as_loaded == loaded
    assert reshaped(wanted.optimizations, shape) == shape
    assert shape.total_params == sum(p.numel() for p in model.parameters())
    plain, small = (facts_of(made, device("cpu"), loaded) for made in (config, wanted))
    assert step_flops(small, (0, 0), 1) < step_flops(plain, (0, 0), 1)
    before, after = (make_plan(made, device("cpu"), loaded, NO_CORPUS) for made in (config, wanted))
    assert after.total_bytes < before.total_bytes and after.total_params == expected.total_params


def test_what_cannot_be_converted_is_refused_or_says_why() -> None:
    def decided(kv_heads: int, **model: Any) -> Any:
        facts = replace(FACTS, model=replace(FACTS.model, **model))
        config = from_overrides().config.optimizations
        found = decide(replace(config, preset="", gqa_conversion=GQAConversion.Config(True, kv_heads)), facts)
        return next(decision for decision in found if decision.name == "gqa_conversion")

    with pytest.raises(ConfigError, match="kv_heads=0: must be positive"):
        from_overrides("optimizations.gqa_conversion.kv_heads=0")
    assert "has 2 key/value heads, no more than kv_heads=2" in decided(2).reason
    six = {"num_attention_heads": 6, "num_key_value_heads": 6, "layer_linears": geometry._shape("x", SIX.to_json_string()).layer_linears}
    with pytest.raises(PlanError, match=r"kv_heads=4: must divide the 6 key/value heads of tiny\s+remedy: .*kv_heads=3"):
        decided(4, **six)
    assert "no plain q_proj" in decided(1, layer_linears=FACTS.model.layer_linears[3:]).reason


SIX = tiny("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=6).config


@pytest.mark.parametrize("init", ["mean", "aligned"])
def test_up_training_changes_the_converted_maps_alone(trained: Trained, init: str, tmp_path: Path) -> None:
    run = trained("debug=tiny", "mode=uptrain", "adapter.method=converted", *CONVERT, f"optimizations.gqa_conversion.init={init}")
    summary = json.loads(run.summary.read_text())
    assert set(summary["conversion"]) == {"before", "after", "uptrained"}
    assert summary["conversion"]["after"] == summary["val_first"] != summary["conversion"]["before"]
    assert summary["conversion"]["uptrained"] == summary["val_last"] != summary["val_first"]
    names = {"k_proj", "v_proj"} if init == "mean" else {"q_proj", "k_proj", "v_proj", "o_proj"}
    saved = {path.name: load_file(path / "model" / "trained.safetensors") for path in run.checkpoints.iterdir()}
    first, last = saved["step_000002"], saved["step_000003"]
    assert {name.split(".")[-2] for name in first} == names and len(first) == 2 * len(names)
    assert all(not torch.equal(first[name], last[name]) for name in first)
    # The whole model, of which nothing else has changed.
    exported = AutoModelForCausalLM.from_pretrained(run.final)
    again = trained("debug=tiny", *CONVERT, f"optimizations.gqa_conversion.init={init}", "name=adapters")
    base = AutoModelForCausalLM.from_pretrained(again.base)
    assert exported.config.num_key_value_heads == base.config.num_key_value_heads == 1
    for (name, one), (_, two) in zip(exported.named_parameters(), base.named_parameters(), strict=True):
        assert torch.equal(one, two) == (name not in first), name
    adapted = PeftModel.from_pretrained(base, again.final)
    assert adapted.peft_config["default"].base_model_name_or_path == str(again.base)
    assert (again.base / "tokenizer.json").is_file() and (run.final / "tokenizer.json").is_file()


def test_a_checkpoint_holds_what_is_trained_and_gives_it_back(tmp_path: Path) -> None:
    def made() -> LoadedModel:
        core = convert(tiny("phi"), 2)
        options = replace(OptimizationsConfig(), gqa_conversion=GQAConversion.Config(True, 2))
        _train_converted(core, replace(RunConfig(), optimizations=options))
        return LoadedModel(core, core, {})

    one, two = made(), made()
    for parameter in one.trainable:
        parameter.data.add_(1)
    copy_trained(one).save(tmp_path)
    load_trained(two, tmp_path)
    assert len(one.trainable) == 2 * 2 * 2
    assert all(torch.equal(a, b) for a, b in zip(one.core.parameters(), two.core.parameters(), strict=True))
    (tmp_path / "trained.safetensors").unlink()
    with pytest.raises(ModelError, match="8 tensors missing"):
        load_trained(two, tmp_path)


def test_up_training_streams(trained: Trained) -> None:
    """The same loss before and after the conversion under both executors, and about the same after three steps."""
    found = []
    for executor in ("whole", "streamed"):
        run = trained("debug=tiny", "mode=uptrain", "adapter.method=converted", *CONVERT, f"executor={executor}", f"name={executor}")
        found.append([losses["val_loss"] for losses in json.loads(run.summary.read_text())["conversion"].values()])
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_an_exported_model_gives_the_same_logits(tmp_path: Path) -> None:
    model = convert(randomised("phi"), 2, "aligned")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits(loaded), logits(model))


def test_up_training_needs_something_to_convert() -> None:
    config = from_overrides("debug=tiny", "adapter.method=converted", "optimizations.gqa_conversion.enabled=true").config
    with pytest.raises(PlanError, match="of debug-tiny's 2|it converts none"):
        make_plan(config, device("cpu"), geometry.shape(config.model), NO_CORPUS)


@pytest.mark.parametrize("init", ["mean", "aligned"])
@pytest.mark.parametrize(
    "on", [("flash_attention",), ("mixed_precision", "flash_attention", "gradient_checkpointing", "fused_loss")], ids=len
)
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_the_peak_of_up_training_is_as_planned(kind: str, on: tuple[str, ...], init: str) -> None:
    case = Case(kind, on)
    options = GQAConversion.Config(True, 1, HeadInit(init))
    base = steps.facts_of(case)
    shape = GQAConversion(options).converted(GQAConversion(options).reshaped(base.model))
    facts = replace(base, model=shape, trainable_params=shape.trained_linear_params, adapter="converted")
    decisions = steps.decisions_of(case, facts)
    core: Any = AutoModelForCausalLM.from_config(
        geometry.hf_config(steps.small(kind, case.width, case.vocab)), attn_implementation=DOCUMENT_EAGER
    )
    convert(core, 1, init)
    apply_stage(Stage.model, decisions, core)
    core.to(torch.bfloat16 if case.half else torch.float32)
    _train_converted(core, replace(RunConfig(), optimizations=replace(OptimizationsConfig(), gqa_conversion=options)))
    apply_stage(Stage.executor, decisions, core)
    assert sum(p.numel() for p in core.parameters() if p.requires_grad) == facts.trainable_params
    peak = steps.measured_peak(case, core.train())
    assert steps.passing(case, facts, decisions).total == pytest.approx(peak, rel=0.05)
