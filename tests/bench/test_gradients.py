"""The bench of gradient errors: in fp32 every pass is within rounding of its reference, and its figures are what they say."""

import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elite.bench import gradients, text
from elite.bench.assemble import write
from elite.compose import from_overrides
from elite.config import AdapterMethod, RunConfig
from elite.distributed.ranks import joined
from elite.errors import DataError
from elite.streaming import Keep, Place, Streaming, WeightPlace

CONTEXT = 256


@pytest.fixture
def config(repository: Path, cache: Path) -> RunConfig:
    """A tiny random model and a real repository."""
    made = from_overrides("debug=tiny", *gradients.ORDINARY, f"data.repo={repository}", f"output.cache={cache}").config
    return text.at_context(made, CONTEXT)


def test_every_layout_gives_the_gradients_of_the_reference(config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Several parts, the last one shorter.
    monkeypatch.setattr(gradients, "REFERENCE_QUERIES", 100)
    write(tmp_path / "new" / "gradients.json", gradients.compare(config, torch.float32, rows=2))
    found = json.loads((tmp_path / "new" / "gradients.json").read_text())
    assert found["context"] == CONTEXT and found["rows"] == 2 and found["dtype"] == "float32" and found["environment"]["versions"]["torch"]
    # Two layers: nine tensors each, final norm and embedding, which is the head; adapters: A and B of seven maps each.
    assert {run["adapter"]: run["tensors"] for run in found["runs"]} == {"full": 20, "lora": 28}
    for run in found["runs"]:
        # The weights are random: a guess among 512.
        assert run["reference_loss"] == pytest.approx(math.log(512), abs=0.2)
        passes = [run["whole"], run["repeated"], run["other_kernel"], *run["streamed"]]
        assert all(line["loss"] == pytest.approx(run["reference_loss"], abs=1e-5) for line in passes)
        assert all(0 < line["worst_error"] <= 1e-5 for line in passes)
        # Of some tensors the error may be the same to the last bit.
        assert run["repeated"]["worst_ratio"] == pytest.approx(1) and run["other_kernel"]["mean_ratio"] != pytest.approx(1)
        assert len(run["streamed"]) == len(gradients.layouts(CONTEXT, AdapterMethod(run["adapter"])))
        assert {line["divides"] for line in run["streamed"]} == {True, False}


def test_one_model_serves_all_layouts(config: RunConfig) -> None:
    adapted = replace(config, adapter=replace(config.adapter, method=AdapterMethod.lora))
    last = Streaming(CONTEXT // 4, CONTEXT // 2, Keep.attention)
    with joined() as ranks:
        bench = gradients.Bench(adapted, torch.float32, gradients.full_rows(text.tokens(config), config, 2), ranks)
        reference = bench.reference()
        fresh = bench.errors(bench.loaded("streamed"), last, reference)
        loaded = bench.loaded("streamed")
        before = {name: (p, p.device, p.detach().clone()) for name, p in loaded.model.named_parameters()}
        for layout in (replace(last, weights=WeightPlace.streamed), replace(last, keep=Keep.multilevel), last):
            reused = bench.errors(loaded, layout, reference)
            assert "forward" not in loaded.core.__dict__
            assert {name for name, _ in loaded.model.named_parameters()} == before.keys()
            for name, p in loaded.model.named_parameters():
                known, device, value = before[name]
                assert p is known and p.device == device and p.grad is None and torch.equal(p, value), (layout, name)
    assert reused == fresh


@pytest.mark.parametrize("adapter", AdapterMethod)
def test_layouts_cover_what_can_differ(adapter: AdapterMethod) -> None:
    found = gradients.layouts(16384, adapter)
    assert found[0].chunk == 16384 and {layout.keep for layout in found} == set(Keep)
    for divides in (True, False):
        chosen = [layout for layout in found[1:] if (16384 % layout.chunk == 0) is divides]
        assert len(chosen) == 2 and {layout.keys_values for layout in chosen} == {Place.device, Place.host}
    streamed = {layout.weights for layout in found}
    assert streamed == ({WeightPlace.streamed} if adapter is AdapterMethod.lora else {WeightPlace.resident})


def rows(*found: tuple[float, list[float], list[float]]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Loss, gradient of `a` and gradient of `b` of each row."""
    return [(loss, {"a": torch.tensor(a), "b": torch.tensor(b)}) for loss, a, b in found]


def test_errors_and_ratios_by_hand() -> None:
    right = rows((1.0, [3.0, 4.0], [2.0]), (1.0, [0.0, 12.0], [0.0]))
    ordinary = gradients.errors(rows((1.5, [3.0, 5.0], [2.2]), (2.5, [0.0, 12.0], [0.0])), right)
    streamed = gradients.errors(rows((1.0, [3.0, 4.0], [1.9]), (1.0, [0.0, 10.0], [0.0])), right)
    # The errors of a row count by their size: sqrt(1 + 0) of sqrt(25 + 144), not the mean of 1/5 and 0.
    assert ordinary.loss == 2 and ordinary.of == pytest.approx({"a": 1 / 13, "b": 0.1})
    assert streamed.loss == 1 and streamed.of == pytest.approx({"a": 2 / 13, "b": 0.05})
    found = gradients.against(ordinary, streamed)
    assert found.pop("worst_ratio_tensor") == "a"
    medians = {"median_error": (2 / 13 + 0.05) / 2, "median_ratio": 1.25, "mean_ratio": 1.0}
    assert found == pytest.approx(
        {"loss": 1.0, "worst_error": 2 / 13, "worst_ratio": 2.0, "tensors_above": 1, "tensors_below": 1} | medians
    )
    with pytest.raises(AssertionError, match="other tensors"):
        gradients.errors([(0.0, {"a": torch.ones(2)})], right[:1])


def test_a_row_is_one_document(config: RunConfig) -> None:
    store = text.tokens(config)
    batches = gradients.full_rows(store, config, 2)
    assert len(batches) == 2 and not torch.equal(batches[0].input_ids, batches[1].input_ids)
    for batch in batches:
        assert batch.documents == ((CONTEXT,),) and batch.label_tokens == CONTEXT - 1
        assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
    with pytest.raises(DataError, match="1000 are asked for"):
        gradients.full_rows(store, config, 1000)
    with pytest.raises(DataError, match="too little text"):
        gradients.full_rows(store, text.at_context(config, 2**20), 1)


def test_the_pretrained_request(repository: Path) -> None:
    asked = text.request(Namespace(context=16384, model_path="/a folder", repo=str(repository)), *gradients.ORDINARY)
    assert (asked.model.name, asked.model.path, asked.data.repo) == ("smollm2_135m", "/a folder", str(repository))
    assert (asked.tier.context, asked.training.global_batch_tokens, asked.adapter.rank) == (16384, 16384, 8)
    assert asked.tier.target_length < asked.tier.context
    on = asked.optimizations
    assert on.flash_attention.enabled and on.gradient_checkpointing.enabled and not (on.fused_lora.enabled or on.fused_loss.enabled)
