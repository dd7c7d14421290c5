"""Loss by position against the losses of single tokens."""

import pytest
import torch
import torch.nn.functional as F

from elite.data.batches import random_batch
from elite.executor.whole import WholeExecutor
from elite.training.positions import by_position, edges
from tests.models import tiny
from tests.optimizations.test_all import ALONE


def test_borders_double_up_to_the_context() -> None:
    assert edges(4096) == [0, 128, 256, 512, 1024, 2048, 4096]
    assert edges(100) == [0, 100]
    assert edges(384) == [0, 96, 192, 384]


def test_each_bucket_is_the_mean_of_its_tokens() -> None:
    model = tiny("llama", vocab_size=97)
    generator = torch.Generator().manual_seed(0)
    rows = [random_batch(1, length, 97, generator) for length in (500, 200, 129)]
    with torch.no_grad():
        logits = [model(row.input_ids, position_ids=row.position_ids, documents=row.documents).logits[0] for row in rows]
    losses = [F.cross_entropy(found, row.labels[0], reduction="none") for found, row in zip(logits, rows, strict=True)]
    found = by_position(WholeExecutor(model, torch.float32), rows, 1024, ALONE)
    assert model.training and [(bucket.first, bucket.end) for bucket in found] == [(0, 128), (128, 256), (256, 512), (512, 1024)]
    for bucket in found[:3]:
        # The last position of a row has nothing to predict.
        parts = torch.cat([loss[:-1][bucket.first : bucket.end] for loss in losses])
        assert bucket.tokens == len(parts) and bucket.loss == pytest.approx(parts.mean().item(), rel=1e-5)
    assert found[3].tokens == 0 and found[3].loss is None
