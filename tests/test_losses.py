"""The fused linear map and cross-entropy against torch's own, with every gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elite import loss_tiles
from elite.loss_tiles import TILE_BYTES, frozen_tile, tile_tokens
from elite.losses import linear_cross_entropy
from tests.plan.live_bytes import LiveBytes

TOKENS, WIDTH, VOCAB = 23, 12, 31


def inputs(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,))
    )
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[::4] = -100
    return hidden, weight, offset if bias else None, labels


def gradients(loss: Tensor, *tensors: Tensor | None, factor: float = 1.0) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss * factor, [tensor for tensor in tensors if tensor is not None])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tile", [0, 1, 7, 23, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_loss_and_gradients_are_those_of_torch(dtype: torch.dtype, tolerance: float, tile: int, smoothing: float, bias: bool) -> None:
    hidden, weight, offset, labels = inputs(dtype, bias)
    ours = linear_cross_entropy(hidden, weight, offset, labels, label_smoothing=smoothing, tile=tile)
    # The reference in fp64 whatever ours is: an error of ours must not hide behind one of torch's.
    doubles = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, offset) if tensor is not None]
    theirs = F.cross_entropy(F.linear(*doubles), labels, reduction="sum", label_smoothing=smoothing)
    assert ours.shape == () and ours.dtype == dtype
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
    for got, expected in zip(gradients(ours, hidden, weight, offset, factor=-2.5), gradients(theirs, *doubles, factor=-2.5), strict=True):
        assert got.dtype == dtype
        assert torch.allclose(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_z_loss() -> None:
    hidden, weight, offset, labels = inputs()
    ours = linear_cross_entropy(hidden, weight, offset, labels, z_loss=0.03, tile=7)
    logits = F.linear(hidden, weight, offset)
    square = torch.where(labels != -100, logits.logsumexp(1).square(), 0.0).sum()
    theirs = F.cross_entropy(logits, labels, reduction="sum") + 0.03 * square
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for got, expected in zip(gradients(ours, hidden, weight, offset), gradients(theirs, hidden, weight, offset), strict=True):
        assert torch.allclose(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.03)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_a_frozen_head_is_seen_in_tiles(
    dtype: torch.dtype, tolerance: float, smoothing: float, z_loss: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of seven words and five tokens, the largest logit in any of them, against the whole head of one that trains."""
    monkeypatch.setattr(loss_tiles, "MOST_WORDS", 7)
    hidden, weight, offset, labels = inputs(dtype, bias)
    frozen = None if offset is None else offset.detach()
    options: dict[str, Any] = {"label_smoothing": smoothing, "z_loss": z_loss}
    right = linear_cross_entropy(hidden, weight, offset, labels, **options)
    for tile in (0, 5):
        ours = linear_cross_entropy(hidden, weight.detach(), frozen, labels, tile=tile, **options)
        assert ours.dtype == dtype and ours.item() == pytest.approx(right.item(), rel=tolerance)
        for factor in (1.0, -2.5):
            loss = linear_cross_entropy(hidden, weight.detach(), frozen, labels, tile=tile, **options)
            got, expected = (gradients(each, hidden, factor=factor)[0] for each in (loss, right))
            assert torch.allclose(got, expected, rtol=tolerance, atol=tolerance)
            right = linear_cross_entropy(hidden, weight, offset, labels, **options)
        with torch.no_grad():
            assert linear_cross_entropy(hidden, weight, offset, labels, tile=tile, **options).item() == pytest.approx(
                ours.item(), rel=tolerance
            )


def test_confident_tokens_keep_their_small_gradients() -> None:
    """Where a label has nearly all the probability, its row nearly cancels; half-precision products must not show in what is left."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 64, generator=generator).bfloat16()
    labels = torch.arange(0, 300, 20)
    hidden = (weight[labels] * (13 / weight[labels].float().square().sum(1, keepdim=True))).bfloat16().requires_grad_()
    logits = (hidden @ weight.mT).detach().double()
    expected = logits.softmax(1) @ weight.double() - weight[labels].double()
    assert 1e-4 < (1 - logits.softmax(1).gather(1, labels[:, None])).mean() < 1e-2
    got = gradients(linear_cross_entropy(hidden, weight, None, labels), hidden)[0].double()
    assert ((got - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-2


def test_another_ignored_label() -> None:
    hidden, weight, offset, labels = inputs()
    labels = labels.masked_fill(labels == -100, 5)
    ours = linear_cross_entropy(hidden, weight, offset, labels, ignore_index=5, tile=4)
    theirs = F.cross_entropy(F.linear(hidden, weight, offset), labels, ignore_index=5, reduction="sum")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_scored_is_zero(smoothing: float) -> None:
    hidden, weight, offset, labels = inputs()
    loss = linear_cross_entropy(hidden, weight, offset, torch.full_like(labels, -100), label_smoothing=smoothing, tile=5)
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(loss, hidden, weight, offset))


def test_only_wanted_gradients_are_formed() -> None:
    hidden, weight, offset, labels = inputs()
    assert offset is not None
    loss = linear_cross_entropy(hidden, weight.detach(), offset.detach(), labels)
    node: Any = loss.grad_fn
    assert [saved is not None for saved in node.saved_tensors] == [True, False, False]
    loss.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, offset, labels).item() == pytest.approx(loss.item(), rel=1e-12)


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, offset, labels = inputs(torch.float32)
    ours = linear_cross_entropy(hidden * 1000, weight, offset, labels)
    theirs = F.cross_entropy(F.linear(hidden * 1000, weight, offset), labels, reduction="sum")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_autocast_decides_the_products_dtype() -> None:
    hidden, weight, offset, labels = inputs(torch.float32)
    expected = gradients(F.cross_entropy(F.linear(hidden, weight, offset), labels, reduction="sum"), hidden, weight, offset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, offset, labels, tile=7)
    exact = linear_cross_entropy(hidden, weight, offset, labels, tile=7)
    assert 0 < abs(loss.item() / exact.item() - 1) < 1e-2
    for got, truth in zip(gradients(loss, hidden, weight, offset, factor=0.3), expected, strict=True):
        assert got.dtype == torch.float32
        assert 0 < ((got / 0.3 - truth).norm() / truth.norm()).item() < 1e-2


def test_half_gradients_take_the_upstream_factor_unrounded() -> None:
    """A factor rounded to bf16 first (1/3 → 0.33398) would scale every gradient by 1.002."""
    hidden, weight, offset, labels = inputs(torch.bfloat16)
    plain = gradients(linear_cross_entropy(hidden, weight, offset, labels), hidden)[0]
    scaled = gradients(linear_cross_entropy(hidden, weight, offset, labels), hidden, factor=1 / 3)[0]
    assert torch.equal(scaled, (plain.float() / 3).bfloat16())


def test_logits_never_exist_whole() -> None:
    tokens, width, vocab, tile = 512, 16, 2048, 32
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width)
    labels = torch.randint(0, vocab, (tokens,))
    live = LiveBytes()
    live.ignore([hidden, weight, labels])
    with live:
        linear_cross_entropy(hidden, weight, None, labels, tile=tile).backward()
    assert live.peak < 4 * (2 * tile * vocab + 4 * tokens * width) < 4 * tokens * vocab / 4


@pytest.mark.parametrize("vocab", [97, 51200, 151936, 10**9])
def test_tiles_fit_their_budget(vocab: int) -> None:
    tokens = tile_tokens(vocab)
    assert tokens == 1 or 4 * vocab * tokens <= TILE_BYTES < 4 * vocab * (tokens + 128)


@pytest.mark.parametrize(
    ("tokens", "width", "vocab"),
    [(8192, 1536, 151936), (8192, 4096, 128256), (100, 576, 49152), (1, 8, 3), (0, 8, 3), (2**21, 4096, 10**6)],
)
def test_tiles_of_a_frozen_head_are_bounded(tokens: int, width: int, vocab: int) -> None:
    rows, words = frozen_tile(tokens, width, vocab)
    assert 1 <= rows <= max(1, tokens + 127) and 1 <= words <= vocab
    assert 4 * rows * width <= loss_tiles.SUM_BYTES and rows * words <= loss_tiles.MOST_LOGITS
    # Equal tiles: none is left with a few tokens.
    assert tokens == 0 or rows * -(-tokens // rows) - tokens < rows
    assert frozen_tile(tokens, width, vocab, 5)[0] <= 5
