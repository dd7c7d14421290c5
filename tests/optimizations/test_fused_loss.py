"""The fused loss inside a whole model: same loss and gradients, also through peft and DDP, and only where logits are the head's alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from elite.attention import DOCUMENT_SDPA
from elite.data.batches import Batch
from elite.errors import PlanError
from elite.executor.whole import WholeExecutor
from elite.optimizations.fused_loss import FusedLoss
from elite.optimizations.gradient_checkpointing import GradientCheckpointing
from tests.models import SIZES, tiny
from tests.optimizations.test_all import FACTS
from tests.test_attention import row


def fuse(core: Any, tile: int = 7) -> Callable[[], None]:
    undo = FusedLoss(FusedLoss.Config(enabled=True, tile=tile)).apply(core).undo
    assert undo is not None
    return undo


def step(model: Any, batch: Batch, fused: bool, keep: Tensor | None = None) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = WholeExecutor(model, torch.float32, fused).loss_sum(batch, keep)
    (loss / 3).backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: tuple[float, dict[str, Tensor]], two: tuple[float, dict[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(two[0], rel=1e-6)
    assert one[1].keys() == two[1].keys()
    for name, expected in two[1].items():
        assert torch.allclose(one[1][name], expected, rtol=1e-4, atol=1e-6 + 1e-5 * expected.abs().max().item()), name


@pytest.mark.parametrize("keep", [None, torch.arange(5, 30)])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("kind", ["llama", "phi", "qwen2"])
def test_loss_and_gradients_are_the_same(kind: str, changes: dict[str, Any], keep: Tensor | None) -> None:
    model, batch = tiny(kind, **changes), row(13, 24)
    expected = step(model, batch, fused=False, keep=keep)
    undo = fuse(model)
    assert_same(step(model, batch, fused=True, keep=keep), expected)
    undo()
    assert "forward" not in vars(model)


def test_through_adapters_and_checkpointing() -> None:
    core, batch = tiny("llama"), row(13, 24)
    model = get_peft_model(core, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    expected = step(model, batch, fused=False)
    GradientCheckpointing(GradientCheckpointing.Config(enabled=True)).apply(core)
    fuse(core)
    assert_same(step(model, batch, fused=True), expected)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_through_ddp() -> None:
    """All weights train, the head's too: the wrapper must see every gradient arrive once."""
    core, batch = tiny("phi"), row(13, 24)
    expected = step(core, batch, fused=False)
    fuse(core)
    loss, gradients = step(DistributedDataParallel(core, broadcast_buffers=False), batch, fused=True)
    assert_same((loss, {name.removeprefix("module."): gradient for name, gradient in gradients.items()}), expected)


def test_the_model_still_answers_with_logits_and_generates() -> None:
    plain, fused, batch = tiny("llama"), tiny("llama"), row(9)
    fuse(fused)
    one, two = (m(input_ids=batch.input_ids, documents=batch.documents, logits_to_keep=2).logits for m in (plain, fused))
    assert one.shape == (1, 2, 97) and torch.equal(one, two)
    outputs = []
    for model in (plain, fused):
        model.set_attn_implementation("sdpa")
        generate: Any = model.eval().generate
        outputs.append(generate(batch.input_ids, max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0))
    assert torch.equal(*outputs)


def test_logits_that_are_not_the_heads_alone_are_refused() -> None:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model("cohere", **SIZES, num_key_value_heads=2, logit_scale=0.5, **ids)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=DOCUMENT_SDPA)
    with pytest.raises(PlanError, match="changes its logits after the head"):
        fuse(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("model_type", ["cohere2", "gemma2", "granitemoe"])
def test_the_plan_knows_architectures_that_scale(model_type: str) -> None:
    reason = FusedLoss(FusedLoss.Config(enabled=True)).check(replace(FACTS, model=replace(FACTS.model, model_type=model_type)))
    assert reason is not None and model_type in reason
