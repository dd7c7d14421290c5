"""The kernel and its reference against torch; under the interpreter on a CPU, in a process of its own."""

import pytest
import torch
import torch.nn.functional as F

from elite.kernels.cross_entropy import reference
from tests.kernels.interpreter import run_interpreted

# Tokens, classes, label smoothing, z-loss.
CASES = [(5, 97, 0.0, 0.0), (4, 64, 0.1, 0.02), (3, 9001, 0.0, 0.0), (3, 20000, 0.2, 0.001)]


def inputs(tokens: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, vocab, generator=generator) * 5
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[1] = -100
    return logits, labels


def expected(logits: torch.Tensor, labels: torch.Tensor, smoothing: float, z_loss: float) -> tuple[torch.Tensor, torch.Tensor]:
    truth = logits.double().requires_grad_()
    losses = F.cross_entropy(truth, labels, ignore_index=-100, label_smoothing=smoothing, reduction="none")
    losses = losses + torch.where(labels != -100, z_loss * truth.logsumexp(1).square(), 0.0)
    return losses.detach(), torch.autograd.grad(losses.sum(), truth)[0]


@pytest.mark.parametrize(("tokens", "vocab", "smoothing", "z_loss"), CASES)
def test_reference_is_torchs_cross_entropy(tokens: int, vocab: int, smoothing: float, z_loss: float) -> None:
    logits, labels = inputs(tokens, vocab)
    losses, gradient = expected(logits, labels, smoothing, z_loss)
    made = reference.cross_entropy(logits, labels, -100, smoothing, True, z_loss)
    torch.testing.assert_close(made.double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-4, atol=1e-6)


def check_kernel(device: str) -> None:
    from elite.kernels.cross_entropy.kernel import cross_entropy

    for tokens, vocab, smoothing, z_loss in CASES:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
            logits, labels = inputs(tokens, vocab)
            logits = logits.to(device, dtype)
            losses, gradient = expected(logits.cpu(), labels, smoothing, z_loss)
            untouched = logits.clone()
            alone = cross_entropy(untouched, labels.to(device), -100, smoothing, False, z_loss)
            assert torch.equal(untouched, logits)
            made = cross_entropy(logits, labels.to(device), -100, smoothing, True, z_loss)
            assert torch.equal(alone, made)
            torch.testing.assert_close(made.cpu().double(), losses, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logits.cpu().double(), gradient, rtol=tolerance, atol=tolerance)


def test_kernel_in_the_interpreter() -> None:
    run_interpreted("tests.kernels.test_cross_entropy", "check_kernel")


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    check_kernel("cuda")
