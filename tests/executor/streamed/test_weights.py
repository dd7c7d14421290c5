"""Weights that wait in host memory are there once."""

import mmap

import psutil
import pytest
import torch
from torch import Tensor, nn

from elite.executor.streamed.weights import StreamedWeights

LAYERS, LAYER_BYTES = 16, 10 * 2**20


def pages(count: int, row_bytes: int, _device: torch.device) -> Tensor:
    """As pinned memory is made for a GPU, but for the lock: pages of its own, none of the heap's."""
    return torch.frombuffer(mmap.mmap(-1, count * row_bytes), dtype=torch.uint8).view(count, row_bytes).zero_()


def test_what_they_leave_goes_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elite.executor.streamed.weights.pinned", pages)
    # From now on the heap keeps what is smaller than this, which is gone at once.
    torch.ones(30 * 2**20 // 4)
    layers = nn.ModuleList(nn.Linear(1024, LAYER_BYTES // 4096, bias=False).requires_grad_(False) for _ in range(LAYERS))
    before = psutil.Process().memory_info().rss
    weights = StreamedWeights(layers, torch.device("cpu"))
    assert weights.host_bytes == LAYERS * LAYER_BYTES
    # Two buffers for the device, and a layer that is on its way.
    assert psutil.Process().memory_info().rss - before < 4 * LAYER_BYTES
