"""Rows on the host and on disk: what a reader waits for, and rows that are made anew."""

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from elite.chunks import Chunk
from elite.executor.streamed.keys_values import KeyValues
from elite.executor.streamed.rows import Allocator, Rows
from elite.streaming import Place

CPU = torch.device("cpu")


def test_a_reader_waits_for_every_write_that_overlaps() -> None:
    """Blocks of gradients are longer than the chunks that read them, and begin elsewhere."""
    rows = Rows(torch.empty(64, 4, dtype=torch.uint8), Place.host)
    pending: Future[None] = Future()
    rows.written[10] = (30, pending)
    assert [bool(rows.under_way(start, stop)) for start, stop in ((0, 10), (0, 11), (15, 20), (29, 64), (30, 64))] == [
        False,
        True,
        True,
        True,
        False,
    ]
    pending.set_result(None)
    assert rows.under_way(0, 64) == []


@pytest.mark.parametrize("place", Place, ids=lambda place: place.value)
def test_rows_are_made_anew_where_they_are_too_small(place: Place, tmp_path: Path) -> None:
    allocator = Allocator(CPU, tmp_path)
    rows = allocator.rows("live", place, 10, 8)
    rows.storage.fill_(7)
    assert allocator.rows("live", place, 5, 8) is rows
    larger = allocator.rows("live", place, 20, 8)
    assert larger is not rows and larger.storage.shape == (20, 8)
    # A thread may still be writing to the old ones: they live until it lets go of them.
    larger.storage.fill_(1)
    assert (rows.storage == 7).all()


def test_keys_of_another_dtype_or_of_other_heads() -> None:
    """Autocast comes and goes between passes, and layers may differ."""
    keys_values = KeyValues(Place.device, 6, 4, Allocator(CPU, None), CPU)
    chunk = Chunk(0, 0, 6, 0, (6,), 6, shares=True)
    for shape, dtype in (((6, 2, 4), torch.float32), ((6, 2, 4), torch.bfloat16), ((6, 1, 8), torch.bfloat16), ((6, 2, 4), torch.float32)):
        k, v = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        keys_values.put(chunk, k, v)
        block = keys_values.view(0, 6)
        assert block.k.dtype is dtype and torch.equal(block.k, k) and torch.equal(block.v, v)
