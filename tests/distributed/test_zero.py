"""ZeRO-2 and ZeRO-3 by DeepSpeed over gloo against one rank: gradients, steps, and checkpoints that any number of ranks goes on from."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from elite import checkpoint, compose, modes
from elite.attention import DOCUMENT_EAGER
from elite.distributed.gradients import gradient_exchange
from elite.distributed.ranks import Ranks
from elite.distributed.zero import Sharded, divide, while_dividing
from elite.errors import CheckpointError, PlanError
from elite.executor.whole import WholeExecutor
from elite.model import LoadedModel
from elite.optimizations import OptimizationsConfig, decide
from elite.optimizations.zero_2 import ZeRO2, active_zero
from elite.optimizations.zero_3 import ZeRO3
from elite.plan.memory import folded, host
from elite.retention import CheckpointConfig
from elite.runfolder import RunFolder
from elite.training.saving import Saver
from elite.training.step import accumulate, make_scaler, optimizer_step
from tests.distributed.forked import together
from tests.distributed.test_ddp import TINY, carried_out, off, window
from tests.models import tiny
from tests.optimizations.test_all import ALONE, BY_NAME, FACTS, on
from tests.training.rig import TRAINING, adapted, fitted, rig, whole_model

pytestmark = pytest.mark.usefixtures("engine")
PAIR = replace(FACTS, device=replace(FACTS.device, count=2))
TWO, THREE = ZeRO2.Config(enabled=True), ZeRO3.Config(enabled=True)
TWO_OFFLOADED = ZeRO2.Config(enabled=True, offload_optimizer=True)
THREE_OFFLOADED = ZeRO3.Config(enabled=True, offload_optimizer=True, offload_parameters=True)
EACH = {"2": TWO, "2_offloaded": TWO_OFFLOADED, "3": THREE, "3_offloaded": THREE_OFFLOADED}


def switched(options: Any, *others: str) -> OptimizationsConfig:
    """ZeRO with these options, beside other parts."""
    changes: dict[str, Any] = {"zero_3" if isinstance(options, ZeRO3.Config) else "zero_2": options}
    return replace(OptimizationsConfig(), **changes | {name: on(BY_NAME[name]) for name in others})


def settings(options: Any, count: int, dtype: str = "float32") -> dict[str, Any]:
    zero = active_zero(decide(switched(options), replace(FACTS, device=replace(FACTS.device, count=count))))
    assert zero is not None
    made = zero.settings(FACTS, dtype)
    if zero.number == 3:
        # Everything in a model this small would stay whole.
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return made


def gradients(ranks: Ranks, options: Any = None) -> dict[str, Any]:
    """Loss and gradients of a step of unequal sequences, and weights after it: after two that are dropped, and one that is taken."""
    model: Any = tiny("llama", DOCUMENT_EAGER, hidden_size=32)
    loaded, before = LoadedModel(model, model, {}), model.get_input_embeddings().weight.detach().clone()
    optimizer, scaler = torch.optim.AdamW(loaded.trainable, lr=1e-2), make_scaler(ranks.device, torch.float32)
    wrapped = model
    if options is not None:
        made = settings(options, ranks.world)
        divide(loaded, made, ranks)
        wrapped = Sharded(loaded, optimizer, made, ranks)
    executor, exchange = WholeExecutor(wrapped, torch.float32), gradient_exchange(wrapped)
    loss = accumulate(executor, window(ranks.rank, ranks.world), scaler, ranks)
    found = [whole_gradient(parameter) for parameter in loaded.trainable]
    norm = exchange.clipped(loaded.trainable, 1e3)
    exchange.drop(optimizer, scaler)
    with exchange.adding():
        bad = executor.loss_sum(window(ranks.rank, ranks.world)[0]) * (math.inf if ranks.rank == 0 else 1.0)
    exchange.last_backward(bad)
    assert not math.isfinite(exchange.clipped(loaded.trainable, 1e3)), "all ranks must know"
    exchange.drop(optimizer, scaler)
    dropped = whole_weights(ranks, exchange, loaded)[0]
    accumulate(executor, window(ranks.rank, ranks.world), scaler, ranks)
    exchange.clipped(loaded.trainable, norm / 2)
    exchange.update(optimizer, scaler)
    if exchange.divides_weights:
        assert all(p.numel() == 0 and p.ds_tensor.numel() == -(-p.ds_numel // ranks.world) for p in model.parameters())
    taken = whole_weights(ranks, exchange, loaded)
    return {"loss": loss, "gradients": found, "norm": norm, "kept": torch.equal(dropped, before), "weights": taken}


def whole_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_grad

    found: torch.Tensor = safe_get_full_grad(parameter)
    return found.clone()


def whole_weights(ranks: Ranks, exchange: Any, loaded: LoadedModel, folder: Path | None = None) -> list[torch.Tensor]:
    """What rank 0 would save, the embedding first; empty on the others."""
    if not ranks.is_main:
        exchange.take_part(loaded)
        return [torch.zeros(0)]
    copy = exchange.copied(loaded)
    folder = folder or Path.cwd() / "weights"
    copy.save(folder)
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return [tensors[name] for name in sorted(tensors, key=lambda name: ("embed_tokens" not in name, name))]


@pytest.mark.parametrize(("name", "world"), [("2", 2), ("3", 2), ("2_offloaded", 4), ("3_offloaded", 4)])
def test_ranks_together_are_one_rank(name: str, world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = gradients(ALONE)
    found = together(tmp_path / name, world, lambda ranks, _: gradients(ranks, EACH[name]))
    for one in found:
        assert one["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert off(one["gradients"], expected["gradients"]) <= 1e-5
        assert one["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    assert expected["kept"] and found[0]["kept"], "a step that is dropped changes nothing"
    assert off(found[0]["weights"], expected["weights"]) <= 1e-5


def half_steps(ranks: Ranks, options: Any = None) -> dict[str, Any]:
    """Clipped steps in fp16, of which the first overflows: losses, norms, scales and the weights after them."""
    model: Any = tiny("llama", DOCUMENT_EAGER, hidden_size=32)
    loaded = LoadedModel(model, model, {})
    optimizer = torch.optim.AdamW(loaded.trainable, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30, growth_interval=2)
    wrapped = model
    if options is not None:
        made = settings(options, ranks.world, "float16")
        divide(loaded, made, ranks)
        wrapped = Sharded(loaded, optimizer, made, ranks)
    executor, found = WholeExecutor(wrapped, torch.float16), list[tuple[float, float, float]]()
    for _ in range(4):
        mine = window(ranks.rank, ranks.world)[: 4 // ranks.world]
        done = optimizer_step(executor, optimizer, scaler, mine, loaded.trainable, 0.1, ranks)
        found.append((done.loss, done.grad_norm, scaler.get_scale()))
    return {"steps": found, "weights": whole_weights(ranks, gradient_exchange(wrapped), loaded)}


def test_losses_are_scaled_for_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = half_steps(ALONE)
    losses, norms, scales = zip(*expected["steps"], strict=True)
    assert scales == (2.0**10, 2.0**10, 2.0**11, 2.0**11), "an overflow, and after two steps without one as much again"
    assert losses[0] == losses[1] > losses[2], "there is no update at an overflow"
    for found in together(tmp_path / "two", 2, lambda ranks, _: [half_steps(ranks, options) for options in (TWO, THREE)])[0]:
        of_ranks = list(zip(*found["steps"], strict=True))
        assert of_ranks[0] == pytest.approx(losses, rel=1e-4) and of_ranks[2] == scales
        assert of_ranks[1][1:] == pytest.approx(norms[1:], rel=1e-3)
        assert not math.isfinite(norms[0]) and not math.isfinite(of_ranks[1][0])
        assert off(found["weights"], expected["weights"]) <= 1e-5


KINDS: dict[str, Callable[[], LoadedModel]] = {"adapters": lambda: adapted("llama"), "whole": lambda: whole_model("llama")}
CLIPPED = replace(TRAINING, max_grad_norm=0.1, weight_decay=0.1)


def run(ranks: Ranks, folder: Path, options: Any, kind: str, saved: Path | None = None, others: tuple[str, ...] = ()) -> dict[str, Any]:
    """Four clipped steps of four sequences, saved after two; or the last two of them."""
    acting = decide(switched(options, *others), replace(FACTS, device=replace(FACTS.device, count=ranks.world)))
    made = None if active_zero(acting) is None else settings(options, ranks.world)
    shape = {"ranks": ranks, "accumulation": 4 // ranks.world, "training": CLIPPED, "rank": 64 if others else 4}
    trainer = rig(folder, acting, 4, loaded=None if others else KINDS[kind](), settings=made, **shape)  # type: ignore[arg-type]
    trainer.keep = CheckpointConfig(milestone_every=2)
    trainer.saver = Saver(trainer.checkpoints, trainer.keep)
    if saved is not None:
        trainer.resume(saved)
    lines = fitted(trainer).steps
    weights = whole_weights(ranks, trainer.exchange, trainer.loaded, folder / "weights")
    trainer.exchange.close()
    figures = {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}
    return figures | {"weights": weights, "val": trainer.progress.last_val["val_loss"]}


def goes_on(folder: Path, options: Any, kind: str, worlds: tuple[int, ...]) -> None:
    """Two ranks are one, go on bit for bit, and others go on from what they saved."""
    alone = run(ALONE, folder / "alone", TWO, kind)
    whole = together(folder / "two", 2, lambda ranks, place: run(ranks, place, options, kind))[0]
    assert whole["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert whole["loss"][3] != pytest.approx(whole["loss"][2], rel=1e-3), "the loss must move to mean anything"
    assert whole["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5) and min(whole["grad_norm"]) > CLIPPED.max_grad_norm
    assert whole["val"] == pytest.approx(alone["val"], rel=1e-5) and off(whole["weights"], alone["weights"]) <= 1e-5
    saved = folder / "two" / "checkpoints" / "step_000002"
    again = together(folder / "again", 2, lambda ranks, place: run(ranks, place, options, kind, saved))[0]
    assert again["loss"] == whole["loss"][2:] and again["val"] == whole["val"]
    assert all(torch.equal(a, b) for a, b in zip(again["weights"], whole["weights"], strict=True))
    for world in worlds:
        # Alone nothing is divided, unless something is offloaded.
        found = together(folder / str(world), world, lambda ranks, place: run(ranks, place, options, kind, saved))[0]
        assert found["loss"] == pytest.approx(whole["loss"][2:], rel=1e-5) and found["val"] == pytest.approx(whole["val"], rel=1e-5)
        assert off(found["weights"], whole["weights"]) <= 1e-5


def test_what_two_ranks_of_zero_3_saved_goes_on_on_two_and_one(tmp_path: Path) -> None:
    goes_on(tmp_path, THREE_OFFLOADED, "whole", (1,))
    # As a run without ZeRO saves it.
    plain, divided = (checkpoint.load_state(tmp_path / name / "checkpoints" / "step_000004")["optimizer"] for name in ("alone", "two"))
    assert plain["param_groups"] == divided["param_groups"] and plain["state"].keys() == divided["state"].keys()
    for place, state in plain["state"].items():
        assert {name: (value.shape, value.dtype) for name, value in state.items()} == {
            name: (value.shape, value.dtype) for name, value in divided["state"][place].items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EACH)
def test_what_two_ranks_saved_goes_on_on_two_one_and_four(name: str, kind: str, tmp_path: Path) -> None:
    goes_on(tmp_path, EACH[name], kind, (1, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "other"),
    [*(("2", other) for other in ("adamw_8bit", "lora_plus", "ema", "swa")), *(("3", other) for other in ("adamw_8bit", "lora_plus"))],
)
def test_other_parts_act_beside_it(name: str, other: str, tmp_path: Path) -> None:
    options, others = EACH[name], (other,)
    alone = run(ALONE, tmp_path / "alone", options, "adapters", others=others)
    whole = together(tmp_path / "two", 2, lambda ranks, place: run(ranks, place, options, "adapters", others=others))[0]
    assert whole["loss"] == pytest.approx(alone["loss"], rel=1e-5) and whole["val"] == pytest.approx(alone["val"], rel=1e-5)
    saved = tmp_path / "two" / "checkpoints" / "step_000002"
    again = together(tmp_path / "again", 2, lambda ranks, place: run(ranks, place, options, "adapters", saved, others))[0]
    assert again["loss"] == whole["loss"][2:] and again["val"] == whole["val"]


@pytest.mark.parametrize(
    ("options", "other", "words"),
    [
        (TWO, "power_sgd", "both decide how ranks exchange gradients"),
        (TWO, "gradient_centralization", "gradients lie in parts on the ranks"),
        (TWO, "adaptive_gradient_clipping", "gradients lie in parts on the ranks"),
        (THREE, "gradient_noise", "gradients lie in parts on the ranks"),
        (TWO, "lookahead", "which would undo the return"),
        (THREE, "ema", "ranks have parts of the weights alone"),
        (THREE, "swa", "ranks have parts of the weights alone"),
        (THREE, "torch_compile", "ranks have parts of the weights alone"),
        (TWO, "kernel_warmup", "gradients of a pass that is no step's"),
        (TWO_OFFLOADED, "adamw_8bit", "state in host memory is fp32"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_does_not_go_with_it_is_refused_with_the_reason(options: Any, other: str, words: str) -> None:
    with pytest.raises(PlanError, match=words) as refused:
        decide(switched(options, other), PAIR)
    assert f"optimizations.{other}" in str(refused.value) and ".enabled=false" in refused.value.remedy


def test_where_it_would_do_nothing_it_says_why() -> None:
    def reason(options: Any, **changes: Any) -> str:
        (one,) = (one for one in decide(switched(options), replace(PAIR, **changes)) if one.requested)
        assert one.active == (not one.reason)
        return one.reason

    alone, old = replace(PAIR.device, count=1), replace(PAIR.device, kind="cuda", supports_bf16=False)
    assert reason(TWO) == reason(THREE) == reason(TWO_OFFLOADED, device=alone) == ""
    assert reason(TWO, device=alone).startswith("one rank has no other to divide with")
    assert reason(THREE_OFFLOADED, device=alone).startswith("one rank has no other to divide weights with")
    assert reason(TWO, device=old) == reason(THREE, device=old) == "", "losses are scaled for fp16"
    streamed = {"executor": "streamed"}
    assert reason(TWO, **streamed) == reason(THREE, **streamed) == reason(THREE, host_weights=True) == ""
    assert "weights wait whole in host memory" in reason(THREE, **streamed, host_weights=True)
    assert reason(TWO, **streamed, journal=True) == "" and "cut off alike" in reason(THREE, **streamed, journal=True)
    assert reason(TWO, adapter="converted") == "" and "in the midst of frozen ones" in reason(THREE, adapter="converted")


def test_its_memory_is_divided_by_the_ranks() -> None:
    card = replace(FACTS.device, kind="cuda", count=4)
    facts = replace(FACTS, device=card, adapter="full", trainable_params=FACTS.model.total_params)
    params, none = facts.model.total_params, folded(facts, decide(OptimizationsConfig(), facts)).standing

    def planned(options: Any) -> tuple[Any, float]:
        decisions = decide(switched(options), facts)
        return folded(facts, decisions).standing, host(facts, decisions)

    # A bucket, which all gradients of so small a model fit into, and the copy of it that is exchanged; the embedding's on its way.
    buckets, largest = 2 * 4 * params, 4 * facts.model.embedding_params
    two, on_host = planned(TWO)
    assert (two.optimizer_state, two.gradients, on_host) == (none.optimizer_state / 4, 4 * params / 4 + buckets, 0)
    two, on_host = planned(TWO_OFFLOADED)
    assert (two.optimizer_state, two.gradients, on_host) == (0, buckets + largest, 20 * params / 4 + largest)
    three, _ = planned(THREE)
    assert three.linear_weights == none.linear_weights / 4 and three.other_weights == none.other_weights / 4
    assert three.runtime > none.runtime, "what is whole at once"
    three, on_host = planned(THREE_OFFLOADED)
    assert (three.linear_weights, three.other_weights, on_host) == (0, 0, (20 + 4) * params / 4)


def test_parts_are_pinned_once() -> None:
    """What is trained is copied into the engine's pinned buffers; frozen parts stay as they are made."""
    card = replace(PAIR, device=replace(PAIR.device, kind="cuda"))
    zero = active_zero(decide(switched(THREE_OFFLOADED), card))
    assert zero is not None
    made = zero.settings(card, "bfloat16")

    def pinned(kind: str) -> Any:
        return while_dividing(made, KINDS[kind]())["zero_optimization"]["offload_param"]["pin_memory"]

    assert (pinned("whole"), pinned("adapters"), made["zero_optimization"]["offload_param"]["pin_memory"]) == (False, True, True)


def prepared(*overrides: str) -> tuple[RunFolder, int]:
    return modes._prepare(compose.from_overrides(*overrides))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("optimizations.zero_2.enabled=true", "optimizations.zero_2.offload_optimizer=true", "executor=streamed", "executor.chunk=48"),
        ("optimizations.zero_3.enabled=true", "optimizations.zero_3.offload_parameters=true", "adapter.method=full"),
        ("optimizations.zero_3.enabled=true", "adapter.method=full", "executor=streamed", "executor.chunk=48"),
    ],
    ids=["2 streamed", "3 whole", "3 streamed"],
)
def test_a_run_saved_on_two_ranks_goes_on_on_one_and_on_four(
    words: tuple[str, ...], tmp_path: Path, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As commands do it; the result is one that the library loads."""
    monkeypatch.chdir(tmp_path)
    where = (f"data.repo={repository}", f"output.cache={cache}", "hardware=cpu")
    begun, processes = prepared(*TINY, *where, *words, "hardware.gpus=2")
    assert processes == 2
    whole = carried_out(begun, 2, tmp_path / "pair")
    applied = json.loads(begun.summary.read_text())["applied"]
    offloaded = ", in host memory" if "offload_" in words[1] else ""
    assert f"trained parameters divided{offloaded}" in applied[words[0].split(".")[1]]
    for world in (1, 4):
        folder = RunFolder(Path(shutil.copytree(begun.path, tmp_path / f"on_{world}")))
        folder.summary.unlink()
        shutil.rmtree(folder.checkpoints / "step_000004")
        again, _ = prepared(*where, f"resume={folder.path}", f"hardware.gpus={world}")
        found = carried_out(again, world, tmp_path / f"of_{world}")
        assert found["losses"] == pytest.approx(whole["losses"], rel=1e-5) and list(found["losses"]) == [1, 2, 3, 4]
        assert found["val"] == pytest.approx(whole["val"], rel=1e-5)
    if "adapter.method=full" in words:
        model = AutoModelForCausalLM.from_pretrained(begun.final)
        saved = load_file(begun.checkpoints / "step_000004" / "model" / "model.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items() if name in saved) and saved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("executor=whole",), {"gradient_checkpointing", "fused_loss"}),
        (("executor=streamed", "executor.chunk=48", "optimizations.ring_attention.enabled=true"), {"ring_attention"}),
    ],
    ids=["whole", "streamed, shared"],
)
def test_the_extreme_preset_composes_it_on_two_ranks(
    words: tuple[str, ...], parts: set[str], tmp_path: Path, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four-bit weights, 8-bit moments and everything else of it under ZeRO-3; its 8-bit state stays with as many ranks."""
    monkeypatch.chdir(tmp_path)
    where = (f"data.repo={repository}", f"output.cache={cache}", "hardware=cpu")
    extreme = (*(word for word in TINY if word != "optimizations=none"), "optimizations=extreme", "adapter.rank=64", *words)
    begun, _ = prepared(*extreme, *where, "hardware.gpus=2")
    found = carried_out(begun, 2, tmp_path / "pair")
    applied = json.loads(begun.summary.read_text())["applied"]
    assert {"zero_3", "qlora", "adamw_8bit", "fused_lora", "mixed_precision", *parts} <= applied.keys()
    assert found["losses"][4] < found["losses"][1] + 0.1
    begun.summary.unlink()
    shutil.rmtree(begun.checkpoints / "step_000004")
    again, _ = prepared(*where, f"resume={begun.path}", "hardware.gpus=2")
    assert carried_out(again, 2, tmp_path / "again") == found
    begun.summary.unlink()
    with pytest.raises(CheckpointError, match="blocks of 8 bits on the ranks that divided it"):
        prepared(*where, f"resume={begun.path}", "hardware.gpus=1")
