"""What a streamed step holds, counted from live tensors: nothing grows with depth, and little with length."""

import gc
from pathlib import Path
from typing import Any

import pytest

from elite.executor.streamed.attach import attach
from elite.executor.streamed.math_kernel import Math
from elite.streaming import Keep, Place, Streaming
from tests.executor.streamed.exactness import tokens
from tests.models import tiny
from tests.plan.live_bytes import LiveBytes
from tests.plan.steps import as_on_cuda

HIDDEN, KV_HEADS, HEAD_DIM, CHUNK = 64, 2, 16, 64
TILED = Math(tile_elements=2**15)
"""Scores of all heads at once, as a library's kernel would hold only tiles of them."""
KEYS_VALUES_BYTES = 4 * KV_HEADS * HEAD_DIM * 4
"""k, v, dk and dv of a token in fp32."""
CALLS_BYTES = 2 * HEAD_DIM * 4
"""Rotary embeddings of a token: cosine and sine."""
LABELS_BYTES = 3 * 8
"""Token, position and label."""
SHORT_AND_LONG = (512, 1024)


def peak(layers: int, length: int, folder: Path, **changes: object) -> int:
    """Most bytes alive at once in a step, parameters, gradients and rows on disk aside."""
    model = tiny("llama", hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=layers)
    for name, parameter in model.named_parameters():
        # Every layer has something to train, but little: sums of gradients are not what is measured.
        parameter.requires_grad_("layernorm" in name)
    layout = Streaming(**{"chunk": CHUNK, "block": 64, "boundaries": Place.disk, "folder": str(folder), **changes})  # type: ignore[arg-type]
    attached = attach(model, layout, choice=lambda _shape: TILED)
    ids = tokens(1, length)
    live = LiveBytes()
    live.ignore([ids, *model.parameters(), *model.buffers()])
    with live:
        model(input_ids=ids, labels=ids).loss.backward()
    allocator = attached.runner.allocator
    on_disk = sum(rows.storage.nbytes for rows in allocator._rows.values() if rows.place is Place.disk)
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    attached.undo()
    return live.peak - on_disk - gradients


@pytest.mark.parametrize("keep", Keep, ids=lambda keep: keep.value)
def test_depth_costs_nothing(keep: Keep, tmp_path: Path) -> None:
    shallow, deep = (peak(layers, 256, tmp_path, keep=keep, slots=2) for layers in (4, 8))
    assert deep <= 1.02 * shallow


@pytest.mark.parametrize("keep", [Keep.layers, Keep.multilevel], ids=lambda keep: keep.value)
def test_length_costs_keys_and_values_of_one_layer(keep: Keep, tmp_path: Path) -> None:
    short, long = (peak(3, length, tmp_path, keep=keep, slots=1) for length in SHORT_AND_LONG)
    slope = (long - short) / (SHORT_AND_LONG[1] - SHORT_AND_LONG[0])
    assert KEYS_VALUES_BYTES <= slope <= KEYS_VALUES_BYTES + CALLS_BYTES + 2 * LABELS_BYTES


def test_length_costs_next_to_nothing_where_keys_lie_elsewhere(tmp_path: Path) -> None:
    """On a CPU rows on the host are tensors too: they are taken out by what they are known to take."""
    short, long = (peak(3, length, tmp_path, keys_values=Place.host) - length * KEYS_VALUES_BYTES for length in SHORT_AND_LONG)
    assert (long - short) / (SHORT_AND_LONG[1] - SHORT_AND_LONG[0]) <= CALLS_BYTES + 2 * LABELS_BYTES


def test_a_whole_pass_holds_several_times_more(tmp_path: Path) -> None:
    """The measure itself sees what it should."""
    model = tiny("llama", hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=6, attention="sdpa")
    ids, live = tokens(1, 512), LiveBytes()
    live.ignore([ids, *model.parameters(), *model.buffers()])
    with live:
        model(input_ids=ids, labels=ids).loss.backward()
    assert live.peak > 5 * peak(6, 512, tmp_path)


def test_the_gradient_of_a_head_is_there_twice_at_most() -> None:
    """The sum over chunks and one chunk's own, whatever the chunks."""
    model: Any = tiny("llama", hidden_size=HIDDEN, vocab_size=8192)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    attached = attach(model, Streaming(chunk=CHUNK, block=64), choice=lambda _shape: TILED)
    ids, live = tokens(1, 5 * CHUNK), LiveBytes()
    live.ignore([ids, *model.parameters(), *model.buffers()])
    with as_on_cuda(), live:
        model(input_ids=ids, labels=ids).loss.backward()
    attached.undo()
    head, logits = model.lm_head.weight.nbytes, CHUNK * 8192 * 4
    assert 2 * head + logits <= live.peak <= 2.4 * head + logits


@pytest.mark.parametrize("keep", [Keep.layers, Keep.attention], ids=lambda keep: keep.value)
def test_nothing_waits_for_the_garbage_collector(keep: Keep) -> None:
    """A circle of references would hold each chunk's tensors until Python happens to look for it: on a GPU, until it is full."""
    model = tiny("llama")
    attached = attach(model, Streaming(chunk=16, block=7, keep=keep))
    ids = tokens(1, 48)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
        # Not the tensors alone: autograd's nodes hold some that Python does not see.
        assert gc.collect() == 0
    finally:
        gc.enable()
        attached.undo()
