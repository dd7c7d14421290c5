"""The streamed executor where copies and computation really run side by side."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from elite.executor.streamed.attach import attach
from elite.executor.streamed.kernels import KERNELS
from elite.streaming import Keep, Place, Streaming, WeightPlace
from tests.executor.streamed.exactness import assert_same, gradients, tokens, uneven

pytestmark = pytest.mark.gpu

LAYOUT = Streaming(chunk=96, block=64, keep=Keep.attention)
LAYOUTS = {
    "attention": LAYOUT,
    "layers": replace(LAYOUT, keep=Keep.layers),
    "device": replace(LAYOUT, boundaries=Place.device),
    "keys on the host": replace(LAYOUT, keys_values=Place.host),
    "weights on the host": replace(LAYOUT, weights=WeightPlace.streamed, keep=Keep.sqrt),
    "disk": replace(LAYOUT, boundaries=Place.disk, keep=Keep.multilevel, slots=2),
}
LARGE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}


def on_gpu(kind: str, **changes: Any) -> Any:
    """A small model with trained norms and frozen matrices, so that weights may be streamed."""
    model: Any = uneven(kind, **changes)
    model.cuda()
    for parameter in model.get_decoder().layers.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    return model


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "phi", "mistral"])
def test_gradients_are_the_ordinary_ones_step_after_step(kind: str, name: str, tmp_path: Path) -> None:
    if kind == "mistral" and name == "keys on the host":
        pytest.skip("windows need keys on the device")
    torch.backends.cuda.matmul.allow_tf32 = False
    model = on_gpu(kind, num_hidden_layers=5)
    rows = [tokens(1, 700, seed).cuda() for seed in range(3)]
    expected = []
    for ids in rows:
        model(input_ids=ids, labels=ids).loss.backward()
        expected.append(gradients(model))
    attached = attach(model, replace(LAYOUTS[name], folder=str(tmp_path)), choice=lambda _shape: KERNELS["math"])
    # Buffers are used again from step to step: what one left behind must not show in the next.
    for ids, wanted in zip(rows, expected, strict=True):
        model(input_ids=ids, labels=ids).loss.backward()
        assert_same(gradients(model), wanted)
    attached.undo()


@pytest.mark.parametrize("name", ["attention", "layers", "keys on the host", "weights on the host"])
def test_the_host_never_waits_for_the_device_inside_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_gpu("llama", **LARGE, num_hidden_layers=4)
    attached = attach(model, replace(LAYOUTS[name], chunk=256, block=256))
    ids = tokens(1, 2048).cuda()

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=2048).loss
        loss.backward()

    step()  # kernels are chosen, rows are made
    begin = attached.runner.begin

    def watched(*arguments: Any) -> None:
        begin(*arguments)
        torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(attached.runner, "begin", watched)
    try:
        step()
        with pytest.raises(RuntimeError, match="synchronizing"):
            ids.sum().item()  # the watch was on
    finally:
        torch.cuda.set_sync_debug_mode("default")
    attached.undo()


def test_device_memory_does_not_grow_with_depth() -> None:
    peaks = []
    for layers in (4, 12):
        model = on_gpu("llama", **LARGE, num_hidden_layers=layers)
        attached = attach(model, Streaming(chunk=512, block=1024, keep=Keep.attention, weights=WeightPlace.streamed))
        ids = tokens(1, 8192).cuda()
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        peaks.append(torch.cuda.max_memory_allocated())
        attached.undo()
        del model, attached, loss
        torch.cuda.empty_cache()
    # What is trained, the norms, is a few kilobytes a layer.
    assert peaks[1] <= 1.01 * peaks[0]
