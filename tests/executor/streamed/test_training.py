"""What is trained, how losses are defined, and what draws random numbers: the streamed step against the ordinary one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from elite.executor.streamed.attach import attach
from elite.executor.streamed.math_kernel import Math
from elite.streaming import Keep, Place, Streaming, WeightPlace
from tests.executor.streamed.exactness import assert_same, gradients, ordinary_loss, shifted, spread, streamed, tokens, uneven
from tests.models import tiny

LAYOUT = Streaming(chunk=16, block=7)
MULTILEVEL = replace(LAYOUT, keep=Keep.multilevel, slots=2)
DOCUMENTS = [[33, 4, 3]]
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Step = tuple[Tensor, dict[str, Tensor | None]]


def lora(model: PreTrainedModel, **changes: Any) -> PeftModel:
    """Adapters whose second matrix is not zero, so that the first has a gradient."""
    adapted = get_peft_model(
        model, LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": MATRICES, "task_type": "CAUSAL_LM", **changes})
    )
    generator = torch.Generator().manual_seed(5)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return adapted


def compare(model: Any, layout: Streaming = LAYOUT, tolerance: float = 1e-5) -> None:
    """One streamed step against the ordinary one."""
    ids = tokens(1, 40)
    loss = ordinary_loss(model, ids, ids, DOCUMENTS)
    loss.backward()
    expected = gradients(model)
    found_loss, found = streamed(model, layout, {"input_ids": ids, "labels": ids, "documents": DOCUMENTS})
    torch.testing.assert_close(found_loss, loss.detach(), rtol=1e-6, atol=0)
    assert_same(found, expected, tolerance)


def train_only(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Freeze everything else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))


TRAINED: dict[str, Callable[[str], bool]] = {
    "head": lambda name: "lm_head" in name,
    "final norm": lambda name: name.startswith("model.norm"),
    "embedding": lambda name: "embed_tokens" in name,
    "embedding and head": lambda name: "embed_tokens" in name or "lm_head" in name,
    "upper layers": lambda name: "layers.3" in name or "layers.4" in name,
    "upper layers and head": lambda name: "layers.4" in name or "lm_head" in name,
    "a middle layer": lambda name: "layers.2" in name,
    "lowest layer": lambda name: "layers.0" in name,
    "one bias": lambda name: "layers.1" in name and "q_proj.bias" in name,
}


@pytest.mark.parametrize("keep", [Keep.layers, Keep.attention, Keep.multilevel], ids=lambda keep: keep.value)
@pytest.mark.parametrize("trained", TRAINED)
def test_some_are_frozen(trained: str, keep: Keep) -> None:
    model = uneven("qwen2", num_hidden_layers=5)
    train_only(model, TRAINED[trained])
    compare(model, replace(LAYOUT, keep=keep, slots=2))


def test_nothing_below_what_is_trained_is_passed_back() -> None:
    """Frozen lower layers cost no backward, as in the ordinary pass."""
    model = uneven("llama", num_hidden_layers=4)
    train_only(model, TRAINED["head"])
    calls = [0] * 4
    for i, layer in enumerate(model.get_decoder().layers):
        layer.self_attn.register_forward_hook(lambda *_arguments, i=i: calls.__setitem__(i, calls[i] + 1))
    streamed(model, Streaming(chunk=64), {"input_ids": tokens(1, 40), "labels": tokens(1, 40)})
    assert calls == [1, 1, 1, 1]


@pytest.mark.parametrize("keep", [Keep.layers, Keep.multilevel], ids=lambda keep: keep.value)
def test_tied_embeddings(keep: Keep) -> None:
    model = uneven("llama", tie_word_embeddings=True, num_hidden_layers=3)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    compare(model, replace(LAYOUT, keep=keep, slots=1))


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_attention_biases(kind: str) -> None:
    model = uneven(kind, attention_bias=True)
    assert any("bias" in name for name, _ in model.named_parameters())
    compare(model)


@pytest.mark.parametrize(
    "layout",
    [LAYOUT, replace(LAYOUT, weights=WeightPlace.streamed, keep=Keep.attention), MULTILEVEL],
    ids=["plain", "streamed", "multilevel"],
)
def test_lora(layout: Streaming) -> None:
    compare(lora(uneven("llama", num_hidden_layers=5)), layout)


def with_dropout(model: Any, layout: Streaming, seed: int = 7) -> Step:
    """A training step under a seed."""
    ids = tokens(2, 40)
    model.train()
    torch.manual_seed(seed)
    return streamed(model, layout, {"input_ids": ids, "labels": ids, "documents": [[33, 4, 3], [40]]})


def dropping(kind: str) -> Any:
    """A model that drops out: adapters' inputs, or the embedding's output and residual branches."""
    if kind == "lora":
        return lora(uneven("llama", num_hidden_layers=5), lora_dropout=0.3)
    return uneven("phi", num_hidden_layers=5, resid_pdrop=0.2, embd_pdrop=0.2)


@pytest.mark.parametrize("kind", ["lora", "phi"])
def test_recomputation_draws_the_same_masks(kind: str) -> None:
    model = dropping(kind)
    loss, expected = with_dropout(model, replace(LAYOUT, keep=Keep.attention))
    for layout in (LAYOUT, MULTILEVEL, replace(MULTILEVEL, slots=1, boundaries=Place.device), replace(LAYOUT, keep=Keep.sqrt)):
        again, found = with_dropout(model, layout)
        assert torch.equal(again, loss)
        assert_same(found, expected, 1e-6)
    assert with_dropout(model, LAYOUT, seed=8)[0] != loss


@pytest.mark.parametrize("kind", ["lora", "phi"])
def test_gradients_under_dropout_are_those_of_the_loss(kind: str) -> None:
    """Along the gradient the loss changes as the gradient says: masks of forward and backward are one."""
    model = dropping(kind).double()
    _, slope = with_dropout(model, LAYOUT)
    norm, step = sum(g.square().sum() for g in slope.values() if g is not None).sqrt(), 1e-3  # type: ignore[union-attr]

    def moved(by: float) -> Tensor:
        for name, parameter in model.named_parameters():
            gradient = slope.get(name)
            if gradient is not None:
                parameter.data.add_(gradient / norm, alpha=by)
        return with_dropout(model, LAYOUT)[0].double()

    rise = moved(step) - moved(-2 * step)
    assert abs(rise / (2 * step) - norm) <= 1e-2 * norm


def test_masks_differ_between_layers_chunks_and_steps() -> None:
    model = uneven("phi", num_hidden_layers=2, resid_pdrop=0.5)
    model.train()
    masks: list[Tensor] = []
    for layer in model.get_decoder().layers:
        layer.resid_dropout.register_forward_hook(lambda _module, _inputs, out: masks.append(out.detach() == 0))
    attached = attach(model, LAYOUT)
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=tokens(1, 48), labels=tokens(1, 48))
    attached.undo()
    assert len(masks) == 2 * 2 * 3 * 2
    # Two of each call, of the attention's and of the MLP's output.
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_the_seed_decides_and_random_state_goes_on() -> None:
    model = dropping("phi")
    model.train()
    attached = attach(model, LAYOUT)
    torch.manual_seed(1)
    losses = [model(input_ids=tokens(1, 40), labels=tokens(1, 40)).loss.item() for _ in range(2)]
    torch.manual_seed(1)
    again = [model(input_ids=tokens(1, 40), labels=tokens(1, 40)).loss.item() for _ in range(2)]
    attached.undo()
    assert losses == again and losses[0] != losses[1]


@pytest.mark.parametrize("weights", WeightPlace, ids=lambda place: place.value)
def test_qlora(weights: WeightPlace) -> None:
    model = uneven("llama", hidden_size=64, num_hidden_layers=3)
    for layer in model.get_decoder().layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    packed = bnb.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        compute_dtype=torch.float32,
                        quant_type="nf4",
                        compress_statistics=True,
                    )
                    packed.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    setattr(parent, name, packed.to("cpu"))
    adapted = lora(model).train()
    compare(adapted, replace(LAYOUT, weights=weights, keep=Keep.sqrt))
    # Packed weights are where they were: the ordinary pass still agrees.
    compare(adapted)


def test_a_chunk_without_scored_tokens() -> None:
    model = uneven("llama")
    ids = tokens(1, 64)
    labels = ids.clone()
    labels[:, 14:50] = -100
    ordinary_loss(model, ids, labels, [[64]]).backward()
    expected = gradients(model)
    _, found = streamed(model, LAYOUT, {"input_ids": ids, "labels": labels})
    assert_same(found, expected)


def test_nothing_scored_counts_for_nothing_in_a_larger_batch() -> None:
    model = uneven("llama")
    labels = torch.full((1, 40), -100)
    loss, found = streamed(model, LAYOUT, {"input_ids": tokens(1, 40), "labels": labels, "num_items_in_batch": 30})
    assert loss == 0
    assert all(g is None or not g.any() for g in found.values())


@pytest.mark.parametrize("count", [57, torch.tensor(57)], ids=["int", "tensor"])
def test_accumulation(count: int | Tensor) -> None:
    """Two micro-batches of unequal lengths, normalised by the tokens of both, as one batch."""
    model = uneven("llama")
    batches = [tokens(1, 40), tokens(1, 19, seed=2)]
    total = sum(ordinary_loss(model, ids, ids, [[ids.shape[1]]]) * (ids.shape[1] - 1) for ids in batches)
    (total / 57).backward()  # type: ignore[union-attr]
    expected = gradients(model)
    attached = attach(model, MULTILEVEL)
    for ids in batches:
        model(input_ids=ids, labels=ids, num_items_in_batch=count).loss.backward()
    attached.undo()
    assert_same(gradients(model), expected)


def test_steps_of_all_lengths() -> None:
    """Rows grow, shrink and change their documents between the steps of one attached model."""
    model = uneven("llama", num_hidden_layers=3)
    attached = attach(model, replace(LAYOUT, keep=Keep.attention))
    for i, documents in enumerate([[[40]], [[90]], [[12, 20]], [[7], [7]], [[50, 10, 30]], [[90]]]):
        ids = tokens(len(documents), sum(documents[0]), seed=i)
        model(input_ids=ids, labels=ids, documents=documents).loss.backward()
        found = gradients(model)
        ordinary_loss(model, ids, ids, documents).backward()
        assert_same(found, gradients(model))
    attached.undo()


def test_label_smoothing() -> None:
    model = uneven("llama")
    ids = tokens(1, 40)
    expected_loss = ordinary_loss(model, ids, ids, DOCUMENTS, smoothing=0.1)
    expected_loss.backward()
    expected = gradients(model)
    loss, found = streamed(model, LAYOUT, {"input_ids": ids, "shift_labels": shifted(ids), "documents": DOCUMENTS, "label_smoothing": 0.1})
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-6, atol=0)
    assert_same(found, expected)


def test_the_loss_may_be_scaled() -> None:
    """A gradient scaler's factor, and terms that others add, reach every gradient once."""
    model = uneven("llama")
    ids = tokens(1, 40)
    (ordinary_loss(model, ids, ids, DOCUMENTS) * 1024).backward()
    expected = gradients(model)
    attached = attach(model, LAYOUT)
    (model(input_ids=ids, labels=ids, documents=DOCUMENTS).loss * 1024).backward()
    attached.undo()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("keep", [Keep.attention, Keep.multilevel], ids=lambda keep: keep.value)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(dtype: torch.dtype, keep: Keep) -> None:
    """As far from fp32 as the ordinary pass under autocast is, within a factor."""
    model = uneven("llama")
    ids = tokens(1, 24)
    ordinary_loss(model, ids, ids, [[24]]).backward()
    exact = gradients(model)
    with torch.autocast("cpu", dtype=dtype):
        ordinary_loss(model, ids, ids, [[24]]).backward()
    plain = gradients(model)
    layout = replace(LAYOUT, chunk=10, keep=keep, slots=1)
    _, found = streamed(model, layout, {"input_ids": ids, "labels": ids}, lambda: torch.autocast("cpu", dtype=dtype))

    def error(some: dict[str, Tensor | None]) -> float:
        pairs = [(some[name], right) for name, right in exact.items()]
        return max(((got - right).norm() / right.norm()).item() for got, right in pairs if got is not None and right is not None)

    assert 0 < error(found) <= 1.5 * error(plain)


def test_low_precision_weights() -> None:
    """Everything in bf16, as large models are trained."""
    model = uneven("llama")
    ids = tokens(1, 24)
    ordinary_loss(model, ids, ids, [[24]]).backward()
    exact = gradients(model)
    model.bfloat16()
    _, found = streamed(model, replace(LAYOUT, chunk=10, keep=Keep.attention), {"input_ids": ids, "labels": ids})
    assert all(g is not None and g.dtype is torch.bfloat16 for g in found.values())
    assert_same({name: g.float() for name, g in found.items() if g is not None}, exact, 0.1)


@pytest.mark.parametrize("keep", Keep, ids=lambda keep: keep.value)
def test_double_precision(keep: Keep) -> None:
    model = uneven("llama", num_hidden_layers=3).double()
    compare(model, replace(LAYOUT, keep=keep, slots=1))


@pytest.mark.parametrize("place", [Place.device, Place.host], ids=["device", "host"])
def test_autocast_may_come_and_go(place: Place) -> None:
    """Training under autocast and evaluation without it, over the same rows."""
    model = uneven("llama")
    ids = tokens(1, 40)
    attached = attach(model, replace(LAYOUT, keys_values=place))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
        attached.undo()
        torch.testing.assert_close(loss, model(input_ids=ids, labels=ids).loss, rtol=1e-6, atol=0)


def test_gradient_checkpointing_besides() -> None:
    """It costs time and changes nothing."""
    model = uneven("llama").train()
    model.gradient_checkpointing_enable()
    compare(model)


def test_another_folder_is_needed_for_the_disk(tmp_path: Path) -> None:
    model = tiny("llama", attention="eager")
    spread(model)
    compare(model.eval(), replace(LAYOUT, boundaries=Place.disk, folder=str(tmp_path / "new" / "folder")))


class ByHead(Math):
    """Leaves the sum over the heads of a group to the caller, as libraries' kernels do; each head's part is another one."""

    def backward_by_head(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward_by_head(*arguments)
        group = dq.shape[1] // dk.shape[1]
        assert group > 1
        shares = torch.arange(1, group + 1).repeat(dk.shape[1])[:, None] * 2 / (group * (group + 1))
        return dq, dk.repeat_interleave(group, 1) * shares, dv.repeat_interleave(group, 1) * shares


@pytest.mark.parametrize("place", [Place.device, Place.host], ids=lambda place: place.value)
def test_kernels_that_leave_a_sum_over_heads_to_the_caller(place: Place) -> None:
    model, ids = uneven("llama"), tokens(1, 40)
    ordinary_loss(model, ids, ids, [[40]]).backward()
    expected = gradients(model)
    attached = attach(model, Streaming(chunk=8, block=12, keys_values=place), choice=lambda _shape: ByHead())
    model(input_ids=ids, labels=ids).loss.backward()
    attached.undo()
    assert_same(gradients(model), expected)


class ReachesBack(Math):
    """Takes a chunk and all keys before it at once."""

    reaches_back = True
    keys: ClassVar[list[int]] = []

    def forward(self, q: Tensor, k: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
        self.keys.append(len(k))
        return super().forward(q, k, *how)


@pytest.mark.parametrize(("place", "keys"), [(Place.device, {8, 16, 24, 32, 40}), (Place.host, {8, 12, 4})], ids=["device", "host"])
def test_kernels_that_reach_back_are_called_once_where_keys_lie_together(place: Place, keys: set[int]) -> None:
    model, ids = uneven("llama"), tokens(1, 40)
    ordinary_loss(model, ids, ids, [[40]]).backward()
    expected = gradients(model)
    ReachesBack.keys.clear()
    attached = attach(model, Streaming(chunk=8, block=12, keys_values=place), choice=lambda _shape: ReachesBack())
    model(input_ids=ids, labels=ids).loss.backward()
    attached.undo()
    assert set(ReachesBack.keys) == keys
    assert_same(gradients(model), expected)
