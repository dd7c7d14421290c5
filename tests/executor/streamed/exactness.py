"""The ordinary pass as a reference for the streamed one: documents one by one, whole, through transformers' own code."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from elite.executor.streamed.attach import Attached, attach
from elite.streaming import Streaming
from tests.models import tiny

VOCABULARY = 97
Documents = Sequence[Sequence[int]]


def spread(model: nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Make attention uneven and biases nonzero: fresh weights are so small that mistakes would hardly show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


def uneven(kind: str, **changes: Any) -> PreTrainedModel:
    """A tiny model in evaluation mode, without dropout, with eager attention outside the streamed pass."""
    model = tiny(kind, attention="eager", **changes).eval()
    spread(model)
    return model


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """[rows, length]"""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def shifted(labels: Tensor) -> Tensor:
    """The label of each position: the token after it in its row, [B, S]."""
    return F.pad(labels, (0, 1), value=-100)[:, 1:]


def ordinary_loss(model: Any, ids: Tensor, labels: Tensor, documents: Documents, smoothing: float = 0.0) -> Tensor:
    """Mean loss over scored tokens, each document passed whole and alone."""
    logits = [model(input_ids=part[None], use_cache=False).logits[0] for row, cut in zip(ids, documents) for part in row.split(list(cut))]
    return F.cross_entropy(torch.cat(logits).float(), shifted(labels).flatten(), label_smoothing=smoothing)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients of what is trained, by name; they are taken from the model."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def streamed(
    model: Any, layout: Streaming, arguments: dict[str, Any], context: Callable[[], Any] = nullcontext
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients of one streamed step; the model is left as it was."""
    attached: Attached = attach(model, layout)
    try:
        with context():
            loss = model(**arguments).loss
        loss.backward()
    finally:
        attached.undo()
    return loss.detach(), gradients(model)


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = 1e-5) -> None:
    """Every gradient tensor, by relative error in the 2-norm; none is missing, none is there besides, none is zero."""
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        got = found[name]
        assert (got is None) == (right is None), f"{name}: {got} instead of {right}"
        if got is not None and right is not None:
            assert got.dtype == right.dtype and got.shape == right.shape
            error = ((got.double() - right.double()).norm() / right.double().norm()).item()
            assert right.norm() > 0 and error <= tolerance, f"{name}: relative error {error:.1e}"
