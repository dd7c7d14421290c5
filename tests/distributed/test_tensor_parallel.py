"""Ranks that divide each layer: loss, gradients, norm, checkpoints and whole runs against one rank's."""

import json
import shutil
from dataclasses import replace
from itertools import accumulate as accumulated
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from elite import compose, geometry, hardware, modes, worker
from elite.attention import DOCUMENT_SDPA
from elite.callbacks import metrics_file
from elite.distributed.ranks import Ranks
from elite.errors import PlanError
from elite.evaluation import evaluate
from elite.executor.whole import WholeExecutor
from elite.facts import Facts, ModelShape
from elite.mode_options import EvaluateConfig
from elite.model import apply_stage
from elite.optimizations import OptimizationsConfig, decide
from elite.optimizations.contract import Passes, Stage
from elite.optimizations.functions.divided import clip_grad_norm_, divide_adapter
from elite.optimizations.tensor_parallel import TensorParallel, divided, refusal
from elite.plan import Plan, make_plan
from elite.plan.memory import predict
from elite.pretrained import byte_tokenizer
from elite.runfolder import RunFolder
from elite.schema import from_yaml
from elite.training.step import accumulate, make_scaler
from tests.distributed.forked import assert_one_ranks, together
from tests.models import tiny
from tests.optimizations.test_all import ALONE, FACTS, only
from tests.plan.helpers import CORPUS
from tests.test_attention import row

WINDOW = [row(20, 17), row(37, seed=2)]
"""Two micro-batches."""
Found = dict[str, tuple[float, float, float, dict[str, Tensor]]]


def adapted(model: Any) -> Any:
    """With adapters that are not zero, divided as their maps are."""
    made = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for module in made.modules():
        if isinstance(module, LoraLayer):
            matrix: Any = module.lora_B["default"]
            torch.nn.init.normal_(matrix.weight, std=0.1)
            divide_adapter(module)
    return made


def gradients(ranks: Ranks, kind: str, lora: bool, parts: tuple[str, ...] = ()) -> tuple[float, float, float, dict[str, Tensor]]:
    """Loss, norm, bytes that were summed over ranks, and gradients of a window, all of them on each rank."""
    core = untrained(kind)
    if ranks.world > 1:
        assert TensorParallel(TensorParallel.Config()).apply(core).count == 2 * len(dict(core.config.base_model_tp_plan).keys() - NORMS)
    torch.manual_seed(1)
    model = adapted(core) if lora else core
    for name in parts:
        apply_stage(Stage.executor, only(name), core)
    executor = WholeExecutor(model, torch.float32, "fused_loss" in parts)
    with Sums() as sums:
        # No rank has other sequences: each counts alone.
        loss = accumulate(executor, WINDOW, make_scaler(ALONE.device, torch.float32), ALONE)
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    found = {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = float(clip_grad_norm_(trained, 0.01))
    assert ranks.world == 1 or {isinstance(parameter, DTensor) for parameter in trained} == {True, False}
    clipped = torch.stack([full(parameter.grad).norm() for parameter in trained if parameter.grad is not None]).norm()
    assert clipped == pytest.approx(0.01, rel=1e-3)
    return loss, norm, sums.bytes, found


class Sums(TorchDispatchMode):
    """Bytes that are handed over to be summed over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if "all_reduce" in str(func):
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def untrained(kind: str) -> Any:
    return tiny(kind, DOCUMENT_SDPA, num_key_value_heads=4)


def planned_bytes(kind: str, lora: bool, forwards: float, ranks: int) -> float:
    """What one rank hands over for the window."""
    shape = divided(shape_of(untrained(kind)), ranks)
    trained = shape.lora_params(4) if lora else shape.total_params
    facts = replace(FACTS, model=shape, context=37, trainable_params=trained, adapter="lora" if lora else "full", dividing=ranks)
    found = TensorParallel(TensorParallel.Config()).exchange(Passes(len(WINDOW), forwards, 4), facts)
    assert found.link_bytes == pytest.approx(found.handed_bytes * 2 * (ranks - 1) / ranks)
    return found.handed_bytes


NORMS = {"layers.*.self_attn.q_norm", "layers.*.self_attn.k_norm"}
Case = tuple[str, bool, tuple[str, ...]]
CASES: tuple[Case, ...] = (
    ("llama", False, ()),
    ("qwen3", True, ("gradient_checkpointing", "fused_loss", "tiled_mlp")),
    ("qwen3", False, ()),
    ("phi", True, ()),
)


def full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(("world", "cases"), [(2, CASES[1:]), (4, CASES[:1])])
def test_loss_gradients_and_norm_are_one_ranks(world: int, cases: tuple[Case, ...], tmp_path: Path) -> None:
    def work(ranks: Ranks, _: Path) -> Found:
        return {f"{kind} {lora}": gradients(ranks, kind, lora, parts) for kind, lora, parts in cases}

    expected = work(ALONE, tmp_path)
    for found in together(tmp_path, world, work):
        for kind, lora, parts in cases:
            case = f"{kind} {lora}"
            loss, norm, _, of_parameters = expected[case]
            assert found[case][0] == pytest.approx(loss, rel=1e-5), case
            assert found[case][1] == pytest.approx(norm, rel=1e-5), case
            # Tiles repeat what is computed again.
            assert parts or found[case][2] == planned_bytes(kind, lora, 1.0, world), case
            assert_one_ranks(found[case][3], of_parameters, case)


ROW = 512
"""Tokens where memory is counted."""
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


PASSES = 5


def highest(ranks: Ranks, _: Path) -> float:
    """Bytes at the peak of a pass, what is there before it not counted; the least of several passes: on a CPU what is sent is let go of by
    another thread, sooner or later."""
    core: Any = tiny("llama", DOCUMENT_SDPA, **WIDE)
    if ranks.world > 1:
        TensorParallel(TensorParallel.Config()).apply(core)
    found = []
    for _again in range(PASSES):
        core.zero_grad(set_to_none=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            accumulate(WholeExecutor(core, torch.float32), [row(ROW)], make_scaler(ALONE.device, torch.float32), ALONE)
        results: Any = seen.profiler
        events = (event for event in results.kineto_results.events() if event.name() == "[memory]")
        # Nobody but the allocator sees what is within a divided tensor's operations.
        found.append(max(accumulated(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))))
    return min(found)


def test_a_rank_takes_what_the_plan_says(tmp_path: Path) -> None:
    found = [(1, highest(ALONE, tmp_path)), *((2, measured) for measured in together(tmp_path, 2, highest))]
    whole = shape_of(tiny("llama", **WIDE))
    for ranks, measured in found:
        own = divided(whole, 2) if ranks == 2 else whole
        facts = Facts(own, replace(FACTS.device, count=ranks), ROW, 1, own.total_params, "full", dividing=ranks)
        switched = OptimizationsConfig().switched({"flash_attention": True, "tensor_parallel": ranks == 2})
        planned = replace(predict(facts, decide(switched, facts)), linear_weights=0.0, other_weights=0.0, optimizer_state=0.0)
        assert planned.total == pytest.approx(measured, rel=0.01), ranks


TINY = (
    *("debug=tiny", "hardware=cpu", "optimizations=none", "optimizations.flash_attention.enabled=true", "adapter.dropout=0"),
    *("optimizations.sequence_packing.enabled=true", "training.micro_batch=1", "training.global_batch_tokens=512"),
    *("training.max_steps=2", "training.val_every=2", "training.checkpoint_every=1", "checkpoint.milestone_every=1"),
    *("training.preflight=true", "data.val_sequences=1", "training.completion_tokens=3"),
)
DIVIDED = ("hardware.gpus=2", "optimizations.tensor_parallel.enabled=true")


def begun(where: tuple[str, ...], *overrides: str) -> RunFolder:
    made, _ = modes._prepare(compose.from_overrides(*TINY, *overrides, *where))
    return made


def carried_out(folder: RunFolder, meeting: Path) -> dict[str, list[float]]:
    """The run on two ranks, to its end: what it wrote of its steps and validations."""

    def work(ranks: Ranks, _: Path) -> None:
        worker.train(folder, ranks)

    together(meeting, 2, work)
    return results(folder)


def results(folder: RunFolder) -> dict[str, list[float]]:
    lines = metrics_file.read(folder.metrics)
    return {key: [line[key] for line in lines if key in line] for key in ("loss", "grad_norm", "val_loss", "tokens")}


def near(one: dict[str, list[float]], two: dict[str, list[float]]) -> bool:
    return all(two[key] == pytest.approx(values, rel=2e-5) and len(values) > 0 for key, values in one.items())


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.slow
def test_a_run_whose_ranks_divide_each_layer_is_the_run_of_one(tmp_path: Path, repository: Path, cache: Path) -> None:
    where = (f"output.cache={cache}", f"data.repo={repository}", f"output.root={tmp_path}", "adapter.method=full")
    alone, pair = begun(where), begun(where, *DIVIDED)
    worker.train(alone, ALONE)
    found = carried_out(pair, tmp_path / "pair")
    assert near(results(alone), found)
    completions = [json.loads((folder.path / "completion.json").read_text()) for folder in (alone, pair)]
    assert completions[0] == completions[1] and "after" in completions[0]
    whole, saved = tensors(alone.final), tensors(pair.final)
    assert whole.keys() == saved.keys() and all(torch.allclose(saved[name], whole[name], rtol=1e-4, atol=1e-6) for name in whole)
    # As it was when its first step was saved.
    again = RunFolder(Path(shutil.copytree(pair.path, tmp_path / "again")))
    again.summary.unlink()
    shutil.rmtree(again.checkpoints / "step_000002")
    modes._prepare(compose.from_overrides(*DIVIDED, *where[:2], "hardware=cpu", f"resume={again.path}"))
    assert carried_out(again, tmp_path / "once_more") == found, "to the last bit"
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors(again.final).items())


@pytest.mark.slow
def test_adapters_of_a_saved_model(tmp_path: Path, repository: Path, cache: Path) -> None:
    """A folder of weights, with the parts that a run usually has, and what one process says of the result."""
    folder = tmp_path / "model"
    tiny("qwen2", vocab_size=512, hidden_size=64).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    where = (f"output.cache={cache}", f"data.repo={repository}", f"output.root={tmp_path}")
    usual = (
        *(f"model.path={folder}", "model.weights=pretrained", "training.learning_rate=0.01"),
        *("optimizations=standard", "optimizations.mixed_precision.enabled=false"),
    )
    alone, pair = begun(where, *usual), begun(where, *usual, *DIVIDED)
    worker.train(alone, ALONE)
    assert near(results(alone), carried_out(pair, tmp_path / "pair"))
    whole, saved = tensors(alone.final), tensors(pair.final)
    assert whole.keys() == saved.keys() and all(torch.allclose(saved[name], whole[name], rtol=1e-3, atol=1e-5) for name in whole)
    evaluated = evaluate(pair, EvaluateConfig(files=1, tokens=3), from_yaml(pair.config).optimizations, ALONE)
    assert evaluated["val_loss"] == pytest.approx(results(alone)["val_loss"][-1], rel=1e-4)


def plan_of(*overrides: str, context: int = 4096) -> Plan:
    config = compose.from_overrides("debug=tiny", "training.global_batch_tokens=16384", *overrides).config
    config = replace(config, tier=replace(config.tier, context=context, target_length=512))
    device = replace(hardware.device(config.hardware), count=config.hardware.gpus or 1)
    return make_plan(config, device, geometry.shape(config.model), CORPUS)


def test_the_plan_of_divided_layers() -> None:
    full = "adapter.method=full"
    alone, pair = plan_of(full, "optimizations=none"), plan_of(full, "optimizations=none", *DIVIDED)
    same = ("total_params", "trainable_params", "step_tokens", "accumulation", "checkpoint_bytes")
    assert [getattr(pair, name) for name in same] == [getattr(alone, name) for name in same]
    assert pair.memory["linear_weights"] == alone.memory["linear_weights"] / 2
    assert pair.memory["other_weights"] == alone.memory["other_weights"]
    assert (
        pair.memory["gradients"] < alone.memory["gradients"] and pair.memory["attention_scores"] < 0.54 * alone.memory["attention_scores"]
    )
    assert list(pair.exchanged) == ["partial results"] and not alone.exchanged
    assert pair.time["exchange"] > 0 == alone.time["exchange"]
    idle = {switch.name: switch.reason for switch in plan_of("optimizations=standard", *DIVIDED).decisions if switch.requested}
    assert "this acts on whole tensors" in idle["fused_lora"] and "this acts on whole tensors" in idle["paged_attention"]
    assert not idle["tensor_parallel"] and "has no other" in plan_reason("tensor_parallel", DIVIDED[1])


def plan_reason(name: str, *overrides: str) -> str:
    return next(switch.reason for switch in plan_of(*overrides).decisions if switch.name == name)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("executor=streamed",), "brings a whole layer to each rank\n.*executor=whole"),
        (("hardware=rtx2060s",), "rtx2060s has no bf16, and fp16's loss scaling"),
        (("hardware.gpus=3",), "3 ranks cannot divide .*its 4 attention heads are no multiple of 3"),
        (("hardware.gpus=4",), "its 2 key/value heads are no multiple of 4"),
        (
            ("optimizations.qlora.enabled=true", "hardware=h100"),
            "tensor_parallel and optimizations.qlora both decide the storage of frozen",
        ),
        (("optimizations.ring_attention.enabled=true",), "both decide which ranks hold a sequence"),
    ],
)
def test_what_cannot_be_divided_is_refused(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        plan_of(*DIVIDED, *overrides)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("phi3", "transformers' plan for phi3 asks for colwise_gather_output, rowwise_split_input, which is not carried out here"),
        ("lfm2", "transformers has no plan for lfm2"),
    ],
)
def test_an_architecture_without_a_plan_to_carry_out_is_refused(kind: str, said: str) -> None:
    assert refusal(shape_of(tiny(kind)), 2) == said


def shape_of(model: Any) -> ModelShape:
    return geometry._shape("tiny", model.config.to_json_string(use_diff=False))
