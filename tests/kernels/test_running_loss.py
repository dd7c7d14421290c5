"""The kernels and their reference against torch, the vocabulary in tiles; under the interpreter on a CPU, in a process of its own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elite.kernels.running_loss import reference
from tests.kernels.interpreter import run_interpreted

Sizes = tuple[int, int, int, int, float, float, bool]
# Tokens, width, words, words of a tile, label smoothing, z-loss, bias.
CASES = [
    (5, 12, 97, 40, 0.0, 0.0, False),
    (4, 20, 64, 64, 0.1, 0.02, True),
    (3, 1030, 700, 600, 0.2, 0.0, False),
    (3, 7, 50, 1, 0.0, 0.01, True),
]


def inputs(case: Sizes) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states, weight, bias and labels; a token that is not scored, and one whose first logits are all −∞."""
    tokens, width, vocab, _, _, _, biased = case
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, width, generator=generator), 3 * torch.randn(vocab, width, generator=generator) / width**0.5
    bias = torch.randn(vocab, generator=generator) if biased else None
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[1] = -100
    return hidden, weight, bias, labels


def expected(case: Sizes) -> tuple[Tensor, Tensor]:
    *_, smoothing, z_loss, _ = case
    hidden, weight, bias, labels = inputs(case)
    wide = hidden.double().requires_grad_()
    logits = F.linear(wide, weight.double(), None if bias is None else bias.double())
    losses = F.cross_entropy(logits, labels, ignore_index=-100, label_smoothing=smoothing, reduction="none")
    losses = losses + torch.where(labels != -100, z_loss * logits.logsumexp(1).square(), 0.0)
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


def run(module: Any, case: Sizes, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Losses and gradient of the hidden states; only the tiles' logits are of `dtype`."""
    tokens, width, vocab, tile, smoothing, z_loss, _ = case
    hidden, weight, bias, labels = (None if t is None else t.to(device) for t in inputs(case))
    assert hidden is not None and weight is not None and labels is not None
    wide = torch.promote_types(dtype, torch.float32)
    state, sums = reference.begun(tokens, smoothing > 0, wide, hidden.device), torch.empty(tokens, width, dtype=wide, device=device)
    alone = state.clone()
    for first in range(0, vocab, tile):
        some = weight[first : first + tile].to(wide)
        offset = None if bias is None else bias[first : first + tile]
        # Rows inside wider ones.
        logits = F.pad((hidden.to(wide) @ some.mT).to(dtype), (0, 3))[:, : len(some)]
        module.absorb(logits.clone(), offset, labels, first, alone, None)
        module.absorb(logits, offset, labels, first, state, sums)
        # On a CPU the library has no product of halves in fp32.
        (module if device == "cuda" else reference).add_rows(sums, logits, some.to(dtype), first == 0)
    gradient = torch.empty(tokens, width, device=device, dtype=wide)
    given = (labels, vocab, -100, smoothing, z_loss)
    losses = module.finish(alone, *given)
    assert torch.equal(losses, module.finish(state, *given, sums, weight, weight.mean(0, dtype=wide) if smoothing else None, gradient))
    return losses, gradient


@pytest.mark.parametrize("case", CASES)
def test_reference_is_torchs_cross_entropy(case: Sizes) -> None:
    for got, right in zip(run(reference, case, torch.float64, "cpu"), expected(case), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-10)


def check_kernel(device: str) -> None:
    from elite.kernels.running_loss import kernel

    for case in CASES:
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 5e-3)):
            for got, right in zip(run(kernel, case, dtype, device), expected(case), strict=True):
                torch.testing.assert_close(got.cpu().double(), right, rtol=tolerance, atol=tolerance)


def check_masked_words(device: str) -> None:
    """Words that a bias of −∞ takes out, a whole tile of them first."""
    from elite.kernels.running_loss import kernel

    logits, labels = torch.randn(2, 8, device=device), torch.tensor([5, 7], device=device)
    bias = torch.tensor([float("-inf")] * 4 + [0.0] * 4, device=device)
    state, sums = reference.begun(2, False, torch.float32, logits.device), torch.zeros(2, 4, device=device)
    for first in (0, 4):
        kernel.absorb(logits[:, first : first + 4].clone(), bias[first : first + 4], labels, first, state, sums)
    losses = kernel.finish(state, labels, 8, -100, 0.0, 0.0)
    torch.testing.assert_close(losses, F.cross_entropy(logits + bias, labels, reduction="none"))
    assert not sums.any()


@pytest.mark.parametrize("check", ["check_kernel", "check_masked_words"])
def test_kernel_in_the_interpreter(check: str) -> None:
    run_interpreted("tests.kernels.test_running_loss", check)


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    check_kernel("cuda")
    check_masked_words("cuda")
