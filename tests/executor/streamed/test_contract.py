"""What `attach` promises besides gradients: what it refuses, that it can be undone, and that others' code works around it."""

import copy
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from elite import hardware, streamable
from elite.distributed.ranks import Ranks
from elite.errors import ModelError, PlanError
from elite.executor.streamed.attach import attach
from elite.executor.streamed.math_kernel import MATH, AttentionShape, Kernel
from elite.executor.streamed.rows import HOST_RESERVE_BYTES
from elite.facts import GIB
from elite.streaming import BoundaryEncoding, Keep, Place, Streaming, WeightPlace
from tests.distributed.forked import together
from tests.executor.streamed.exactness import assert_same, gradients, ordinary_loss, streamed, tokens, uneven
from tests.models import tiny

LAYOUT = Streaming(chunk=16, block=7)
IDS = tokens(2, 40)


def batch() -> dict[str, Any]:
    return {"input_ids": IDS, "labels": IDS}


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("gemma2", {}, "caps its logits"),
        ("gemma2", {"final_logit_softcapping": None}, "caps its attention scores"),
        ("gpt2", {}, "elsewhere than in get_decoder"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
        ("cohere", {}, "scales its logits"),
    ],
)
def test_models_that_cannot_be_streamed(kind: str, changes: dict[str, Any], why: str) -> None:
    model = tiny(kind, attention="eager", **changes)
    with pytest.raises(ModelError, match=why) as raised:
        attach(model, LAYOUT)
    assert raised.value.remedy == "executor=whole"
    assert type(model).__name__ in raised.value.problem and "forward" not in model.__dict__


@pytest.mark.parametrize("trains", [True, False], ids=["training", "evaluation"])
def test_layers_without_attention(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution over chunks would miss what lies before each: an error, in evaluation as well."""
    model = tiny("lfm2", attention="eager")
    with pytest.raises(ModelError, match="no attention"):
        attach(model, LAYOUT)
    # An architecture that does not say so in its configuration is found out when it runs.
    monkeypatch.setattr(streamable, "ATTENTION", frozenset(model.config.layer_types))
    attached = attach(model, LAYOUT)
    with pytest.raises(ModelError, match="attention"), torch.set_grad_enabled(trains):
        loss = model(**batch()).loss
        if trains:
            loss.backward()
    attached.undo()


def test_windows_with_keys_on_the_host() -> None:
    with pytest.raises(ModelError, match="sliding window"):
        attach(tiny("mistral"), replace(LAYOUT, keys_values=Place.host))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"keep": Keep.attention, "encoding": BoundaryEncoding.int8}, "encoding=int8"),
        ({"keys_values": Place.disk}, "keys_values=disk"),
        ({"chunk": 0}, "chunk=0"),
        ({"block": -1}, "block=-1"),
        ({"keep": Keep.multilevel, "slots": 0}, "slots=0"),
    ],
)
def test_layouts_that_contradict_themselves(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(PlanError, match=why):
        attach(tiny("llama"), replace(LAYOUT, **changes))


def test_a_disk_needs_a_folder() -> None:
    model = tiny("llama")
    attached = attach(model, replace(LAYOUT, boundaries=Place.disk))
    with pytest.raises(PlanError, match="folder"):
        model(**batch())
    attached.undo()


def test_a_host_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    monkeypatch.setattr(hardware, "host_memory", lambda: (64 * GIB, HOST_RESERVE_BYTES + 1000))
    with pytest.raises(PlanError, match="streamed weights take"):
        attach(model, replace(LAYOUT, weights=WeightPlace.streamed))
    attached = attach(model, LAYOUT)
    with pytest.raises(PlanError, match="of host memory"):
        model(**batch())
    attached.undo()


def test_documents_must_fill_their_rows() -> None:
    model = tiny("llama")
    attached = attach(model, LAYOUT)
    with pytest.raises(ModelError, match="documents"):
        model(**batch(), documents=[[30], [50]])
    attached.undo()


def test_only_token_ids_can_be_streamed() -> None:
    model = tiny("llama")
    attached = attach(model, LAYOUT)
    with pytest.raises(ModelError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32), labels=IDS[:1, :4])
    attached.undo()


def test_one_forward_one_backward() -> None:
    model = uneven("llama")
    attached = attach(model, LAYOUT)
    first = model(**batch()).loss
    with torch.no_grad():
        model(**batch())
    with pytest.raises(RuntimeError, match="another streamed forward"):
        first.backward()
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        loss.backward()
    attached.undo()


def test_a_step_after_a_failed_one() -> None:
    """A forward without its backward, or one that an error ended, leaves nothing behind."""
    model = uneven("llama")
    ordinary_loss(model, IDS, IDS, [[40], [40]]).backward()
    expected = gradients(model)
    attached = attach(model, replace(LAYOUT, keep=Keep.multilevel, slots=1))
    model(**batch())
    handle = model.get_decoder().layers[1].mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("fault")))
    with pytest.raises(KeyError, match="fault"):
        model(**batch())
    handle.remove()
    model(**batch()).loss.backward()
    attached.undo()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("keep", [Keep.layers, Keep.attention], ids=lambda keep: keep.value)
def test_evaluation(keep: Keep) -> None:
    model = uneven("phi", num_hidden_layers=3)
    attached = attach(model, replace(LAYOUT, keep=keep))
    with torch.no_grad():
        loss = model(**batch()).loss
        assert not loss.requires_grad
        attached.undo()
        torch.testing.assert_close(loss, model(**batch()).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", WeightPlace, ids=lambda place: place.value)
def test_undo(weights: WeightPlace) -> None:
    model = uneven("llama", num_hidden_layers=3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method, attributes = type(model).forward, set(model.__dict__)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    attached = attach(model, replace(LAYOUT, weights=weights))
    model(**batch()).loss.backward()
    during = model.state_dict()
    assert list(during) == list(before) and all(during[name].shape == before[name].shape for name in before)
    attached.undo()
    assert type(model).forward is method and set(model.__dict__) == attributes
    assert model.config._attn_implementation == "eager"
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits)
    for layer in model.get_decoder().layers:
        assert "forward" not in layer.__dict__


def test_undo_gives_files_back(tmp_path: Path) -> None:
    model = uneven("llama")
    attached = attach(model, replace(LAYOUT, boundaries=Place.disk, folder=str(tmp_path)))
    model(**batch()).loss.backward()
    assert list(tmp_path.rglob("slot*"))
    attached.undo()
    assert list(tmp_path.iterdir()) == []


def test_an_instance_with_a_forward_of_its_own() -> None:
    """As accelerate sets it: it is called without labels and is back after `undo`."""
    model = uneven("llama")
    own, calls = model.forward, []

    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return own(*arguments, **named)

    model.forward = wrapped
    attached = attach(model, LAYOUT)
    model(input_ids=IDS)
    model(**batch())
    assert calls == [1]
    attached.undo()
    assert model.forward is wrapped


def test_the_signature_stays() -> None:
    """Trainers read it: a column of the data that `forward` does not name, such as position_ids, would silently be dropped."""
    model = tiny("llama")
    before = inspect.signature(model.forward)
    attached = attach(model, LAYOUT)
    assert inspect.signature(model.forward) == before
    attached.undo()


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_generation(kind: str) -> None:
    model: Any = uneven(kind)
    model.config.use_cache = True
    expected = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    attached = attach(model, LAYOUT)
    model(**batch()).loss.backward()
    found = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    attached.undo()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_hooks_fire_once_a_step(tied: bool) -> None:
    model = uneven("llama", tie_word_embeddings=tied, num_hidden_layers=4)
    fired: dict[str, list[str]] = {name: [] for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, name=name: fired[name].append("gradient"))
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired[name].append("accumulated"))
    attached = attach(model, replace(LAYOUT, keep=Keep.multilevel, slots=2))
    model(**batch()).loss.backward()
    attached.undo()
    assert all(events == ["gradient", "accumulated"] for events in fired.values()), fired


def test_a_copy_of_an_undone_model() -> None:
    """Nothing of the pass clings to it."""
    model = uneven("llama")
    expected = streamed(model, LAYOUT, batch())
    again = copy.deepcopy(model)
    found = streamed(again, LAYOUT, batch())
    assert torch.equal(found[0], expected[0])
    assert_same(found[1], expected[1], 0)


def _rank(ranks: Ranks, folder: Path) -> dict[str, torch.Tensor | None]:
    """Its averaged gradients."""
    model = uneven("llama", num_hidden_layers=3, tie_word_embeddings=True)
    attached = attach(model, replace(LAYOUT, keep=Keep.sqrt))
    parallel = DistributedDataParallel(model, bucket_cap_mb=0.001)
    mine = IDS[ranks.rank : ranks.rank + 1]
    for step in range(2):
        # The first of two micro-batches stays here, the second averages their sum.
        parallel.require_backward_grad_sync = step == 1
        parallel(input_ids=mine, labels=mine).loss.backward()
    attached.undo()
    return gradients(model)


def test_data_parallel(tmp_path: Path) -> None:
    """Two processes with a row each: their averaged gradients are those of both rows in one process."""
    model = uneven("llama", num_hidden_layers=3, tie_word_embeddings=True)
    (2 * ordinary_loss(model, IDS, IDS, [[40], [40]])).backward()
    expected = gradients(model)
    for found in together(tmp_path, 2, _rank):
        assert_same(found, expected)


def test_streamed_weights_may_be_written_between_steps() -> None:
    """Loading a checkpoint, merging an adapter: the next step works with what is there then."""
    model, other = uneven("llama"), uneven("llama")
    for frozen in (model, other):
        frozen.get_decoder().layers.requires_grad_(False)
    attached = attach(model, replace(LAYOUT, weights=WeightPlace.streamed))
    model(**batch()).loss.backward()
    with torch.no_grad():
        for changed in (model, other):
            for parameter in changed.get_decoder().layers[0].parameters():
                parameter.mul_(0.5)
            changed.get_decoder().layers[1].mlp.up_proj.weight.data = changed.get_decoder().layers[1].mlp.up_proj.weight.data * 2
    plain = ordinary_loss(other, IDS, IDS, [[40], [40]])
    assert model(**batch()).loss.item() == pytest.approx(plain.item(), rel=1e-5)
    attached.undo()


def test_a_kernel_is_chosen_once_for_a_shape() -> None:
    """The answer may lie in a file, and every layer asks for every chunk."""
    asked = []

    def choice(shape: AttentionShape) -> Kernel:
        asked.append(shape)
        return MATH

    attached = attach(tiny("llama", attention="eager"), LAYOUT, choice=choice)
    for _ in range(2):
        attached.runner._core(**batch()).loss.backward()
    attached.undo()
    assert len(asked) == len(set(asked)) == 1
