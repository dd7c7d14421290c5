"""Ranks that divide each layer: loss, gradients, norm, checkpoints and whole runs against one rank's."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM

from elite import compose, geometry, hardware, modes, worker
from elite.attention import DOCUMENT_SDPA
from elite.callbacks import metrics_file
from elite.distributed.ranks import Ranks
from elite.errors import PlanError
from elite.executor.whole import WholeExecutor
from elite.model import apply_stage
from elite.optimizations.contract import Stage
from elite.optimizations.functions.divided import clip_grad_norm_, divide_adapter
from elite.optimizations.tensor_parallel import TensorParallel, divided, refusal
from elite.plan import make_plan
from elite.runfolder import RunFolder
from elite.training.step import accumulate, make_scaler
from tests.distributed.forked import together
from tests.models import tiny
from tests.optimizations.test_all import ALONE, only
from tests.plan.helpers import CORPUS
from tests.test_attention import row

WINDOW = [row(20, 17), row(37, seed=2)]
"""Two micro-batches."""
Found = dict[str, tuple[float, float, dict[str, Tensor]]]


def adapted(model: Any) -> Any:
    """With adapters that are not zero, divided as their maps are."""
    made = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for module in made.modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1)
            divide_adapter(module)
    return made


def gradients(ranks: Ranks, kind: str, lora: bool, parts: tuple[str, ...] = ()) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, norm and gradients of a window, all of them on each rank."""
    core: Any = tiny(kind, DOCUMENT_SDPA, num_key_value_heads=4)
    if ranks.world > 1:
        assert TensorParallel(TensorParallel.Config()).apply(core).count == 2 * len(dict(core.config.base_model_tp_plan).keys() - NORMS)
    torch.manual_seed(1)
    model = adapted(core) if lora else core
    for name in parts:
        apply_stage(Stage.executor, only(name), core)
    # No rank has other sequences: each counts alone.
    loss = accumulate(WholeExecutor(model, torch.float32, "fused_loss" in parts), WINDOW, make_scaler(ALONE.device, torch.float32), ALONE)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    found = {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = float(clip_grad_norm_(trained, 0.01))
    assert ranks.world == 1 or {isinstance(parameter, DTensor) for parameter in trained} == {True, False}
    clipped = torch.stack([full(parameter.grad).norm() for parameter in trained if parameter.grad is not None]).norm()
    assert clipped == pytest.approx(0.01, rel=1e-3)
    return loss, norm, found


NORMS = {"layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"}
Case = tuple[str, bool, tuple[str, ...]]
CASES: tuple[Case, ...] = (
    ("llama", False, ()),
    ("llama", True, ("gradient_checkpointing", "fused_loss", "tiled_mlp")),
    ("qwen3", False, ()),
    ("phi", True, ()),
)


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(("world", "cases"), [(2, CASES), (4, CASES[:1])])
def test_loss_gradients_and_norm_are_one_ranks(world: int, cases: tuple[Case, ...], tmp_path: Path) -> None:
    def work(ranks: Ranks, _: Path) -> Found:
        return {f"{kind} {lora}": gradients(ranks, kind, lora, parts) for kind, lora, parts in cases}

    expected = work(ALONE, tmp_path)
    for found in together(tmp_path, world, work):
        for case, (loss, norm, of_parameters) in expected.items():
            assert found[case][0] == pytest.approx(loss, rel=1e-5), case
            assert found[case][1] == pytest.approx(norm, rel=1e-5), case
            assert found[case][2].keys() == of_parameters.keys()
            # A key's bias has no gradient but rounding: softmax does not see it.
            most = max(gradient.norm().item() for gradient in of_parameters.values())
            for name, gradient in of_parameters.items():
                error = (found[case][2][name] - gradient).norm().item()
                assert error <= max(1e-5 * gradient.norm().item(), 1e-7 * most), (case, name, error / gradient.norm().item())


TINY = (
    *("debug=tiny", "hardware=cpu", "optimizations=none", "optimizations.flash_attention.enabled=true", "adapter.dropout=0"),
    *("optimizations.sequence_packing.enabled=true", "training.micro_batch=1", "training.global_batch_tokens=512"),
    *("training.max_steps=3", "training.val_every=3", "training.checkpoint_every=1", "checkpoint.milestone_every=1"),
    *("training.preflight=true", "data.val_sequences=1", "training.completion_tokens=3"),
)
DIVIDED = ("hardware.gpus=2", "optimizations.tensor_parallel.enabled=true")


def begun(where: tuple[str, ...], *overrides: str) -> RunFolder:
    made, _ = modes._prepare(compose.from_overrides(*TINY, *overrides, *where))
    return made


def results(folder: RunFolder) -> dict[str, Any]:
    lines = metrics_file.read(folder.metrics)
    return {key: [line[key] for line in lines if key in line] for key in ("loss", "grad_norm", "val_loss", "tokens")} | {
        "completion": json.loads((folder.path / "completion.json").read_text())["after"]
    }


def equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    same = [two[key] == pytest.approx(one[key], rel=2e-5) and len(one[key]) > 0 for key in ("loss", "grad_norm", "val_loss", "tokens")]
    return all(same) and one["completion"] == two["completion"]


def test_a_run_whose_ranks_divide_each_layer_is_the_run_of_one(tmp_path: Path, repository: Path, cache: Path) -> None:
    where = (f"output.cache={cache}", f"data.repo={repository}", f"output.root={tmp_path}")
    full = "adapter.method=full"
    alone = begun(where, full)
    worker.train(alone, ALONE)
    pair = begun(where, full, *DIVIDED)

    def work(ranks: Ranks, _: Path) -> None:
        worker.train(pair, ranks)

    together(tmp_path / "pair", 2, work)
    assert equal(results(alone), results(pair))
    print(results(pair))
