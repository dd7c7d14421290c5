"""Attention stays inside documents, and inside a document it is the model's own."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from elite.attention import DOCUMENT_EAGER, DOCUMENT_SDPA, generating
from elite.data.batches import IGNORE, Batch
from elite.executor.whole import WholeExecutor
from tests.models import tiny

KERNELS = (DOCUMENT_SDPA, DOCUMENT_EAGER)


def row(*lengths: int, seed: int = 1) -> Batch:
    """One row of documents with random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 97, (1, sum(lengths)), generator=generator)
    labels, positions = ids.roll(-1, 1), []
    end = 0
    for length in lengths:
        end += length
        labels[0, end - 1] = IGNORE
        positions.append(torch.arange(length))
    return Batch(ids, labels, torch.cat(positions)[None], (tuple(lengths),))


def part(batch: Batch, start: int, end: int) -> Batch:
    """One document of a row, as a row of its own."""
    return Batch(batch.input_ids[:, start:end], batch.labels[:, start:end], batch.position_ids[:, start:end], ((end - start,),))


def loss_and_gradients(model: PreTrainedModel, *batches: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    executor = WholeExecutor(model, torch.float32)
    losses = [executor.loss_sum(batch) for batch in batches]
    torch.stack(losses).sum().backward()
    return sum(loss.item() for loss in losses), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["llama", "phi", "mistral"])
def test_packed_documents_equal_documents_alone(kind: str, kernel: str) -> None:
    model = tiny(kind, kernel)
    packed = row(13, 24)
    together, gradients = loss_and_gradients(model, packed)
    apart, expected = loss_and_gradients(model, part(packed, 0, 13), part(packed, 13, 37))
    assert together == pytest.approx(apart, rel=1e-5)
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item()), name


@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_wrong_border_would_show(kind: str) -> None:
    model = tiny(kind)
    packed = row(13, 24)
    moved = Batch(packed.input_ids, packed.labels, packed.position_ids, ((14, 23),))
    assert loss_and_gradients(model, packed)[0] != pytest.approx(loss_and_gradients(model, moved)[0], rel=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["llama", "phi", "mistral", "qwen2"])
def test_one_document_equals_transformers_own_attention(kind: str, kernel: str) -> None:
    batch = row(29)
    loss, gradients = loss_and_gradients(tiny(kind, kernel), batch)
    reference = tiny(kind, "eager")
    logits = reference(input_ids=batch.input_ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[0], batch.labels[0], ignore_index=IGNORE, reduction="sum")
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5 * parameter.grad.abs().max().item()), name


def test_rows_may_hold_different_documents() -> None:
    model = tiny("llama")
    one, two = row(10, 7), row(5, 12, seed=2)
    both = Batch(
        torch.cat([one.input_ids, two.input_ids]),
        torch.cat([one.labels, two.labels]),
        torch.cat([one.position_ids, two.position_ids]),
        one.documents + two.documents,
    )
    assert loss_and_gradients(model, both)[0] == pytest.approx(loss_and_gradients(model, one, two)[0], rel=1e-5)


def test_kept_positions_score_the_same() -> None:
    model, batch = tiny("llama"), row(20)
    labels = batch.labels.clone()
    labels[:, :12] = IGNORE
    masked = Batch(batch.input_ids, labels, batch.position_ids, batch.documents)
    executor = WholeExecutor(model, torch.float32)
    assert executor.loss_sum(masked, torch.arange(12, 20)).item() == pytest.approx(executor.loss_sum(masked).item(), rel=1e-6)


def test_generation_restores_attention_and_mode() -> None:
    model = tiny("llama")
    generate: Any = model.generate
    with generating(model):
        out = generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, use_cache=True, pad_token_id=0)
        assert out.shape[1] <= 7
    assert model.config._attn_implementation == DOCUMENT_SDPA and model.training
