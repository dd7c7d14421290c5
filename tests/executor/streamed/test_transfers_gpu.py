"""Copies to the device never meet what the computation has yet to do with the same memory."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elite.executor.streamed.keys_values import token_range
from elite.executor.streamed.rows import Allocator
from elite.executor.streamed.transfers import Transfers
from elite.executor.streamed.weights import StreamedWeights
from elite.streaming import Place

pytestmark = pytest.mark.gpu

ROWS, ROW_BYTES = 64, 2**19
BEHIND = 10**9
"""Cycles of the device, half a second and more: copies of so few bytes would long be over."""


def delayed(size: int) -> int:
    """Memory that is free again for whoever comes next, though the computation still has to write to it; its address."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.zeros(size, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(BEHIND)
    before.fill_(1)
    return before.data_ptr()


def test_the_first_use_of_a_staging_buffer() -> None:
    device = torch.device("cuda")
    rows = Allocator(device, None).rows("some", Place.host, ROWS, ROW_BYTES)
    rows.storage.fill_(7)
    chunk = token_range(0, ROWS)
    with ThreadPoolExecutor() as disk:
        transfers = Transfers(device, ROWS, disk)
        address = delayed(ROWS * ROW_BYTES)
        for _, data in transfers.read([chunk], {"some": rows}):
            assert data["some"].data_ptr() == address, "the buffer lies elsewhere: nothing would be seen"
            assert int(data["some"].min()) == int(data["some"].max()) == 7


def test_the_first_use_of_a_buffer_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [nn.Linear(1024, 4096, bias=False).requires_grad_(False) for _ in range(2)]
    for number, one in enumerate(maps):
        one.weight.fill_(number + 2.0)
    made, addresses = torch.empty, []

    def after_others(*shape: Any, **options: Any) -> Tensor:
        if str(options.get("device")) == "cuda":
            addresses.append(delayed(shape[0]))
        return made(*shape, **options)

    monkeypatch.setattr("elite.executor.streamed.weights.torch.empty", after_others)
    weights = StreamedWeights(nn.ModuleList(maps), torch.device("cuda"))
    monkeypatch.undo()
    # Brings the second one too, into the buffer that was made last.
    for number, one in enumerate(maps):
        with weights.use(number, following=1):
            assert one.weight.data_ptr() in addresses, "the buffer lies elsewhere: nothing would be seen"
            assert float(one.weight.min()) == float(one.weight.max()) == number + 2.0
