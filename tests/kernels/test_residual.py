"""The kernel against its reference where nothing is dropped, and its masks by their frequencies and by what gradients say of them."""

import pytest
import torch
from torch import Tensor

from elite.kernels.residual import reference
from tests.kernels.interpreter import run_interpreted

SHAPES = [(3, 80), (2, 3, 1111), (0, 16)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Residual, two parts, what arrives."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(4)]


def test_reference_drops_as_torch() -> None:
    residual, first, second, _ = inputs((200, 50), torch.float64, "cpu")
    torch.testing.assert_close(reference.add_dropped(residual, (first, second), 0.0), residual + first + second)
    ones = torch.ones(200, 50, dtype=torch.float64)
    found = reference.add_dropped(0 * ones, (ones,), 0.25)
    assert set(found.unique().tolist()) == {0.0, 1 / 0.75}


def check_sums(device: str) -> None:
    from elite.kernels.residual.kernel import add_dropped

    for shape in SHAPES:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2e-3)):
            for count in (1, 2):
                *given, upstream = inputs(shape, dtype, device)
                leaves = [t.requires_grad_() for t in given[: 1 + count]]
                out = add_dropped(leaves[0], tuple(leaves[1:]), 0.0)
                exact = reference.add_dropped(leaves[0].double(), tuple(t.double() for t in leaves[1:]), 0.0)
                assert out.dtype is dtype
                torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=2 * tolerance)
                assert all(torch.equal(g, upstream) for g in torch.autograd.grad(out, leaves, upstream))


def check_masks(device: str) -> None:
    """Both parts' masks follow from the outputs of parts of ones; gradients must carry the same masks."""
    from elite.kernels.residual.kernel import add_dropped

    shape, p = (300, 111), 0.3
    zeros, ones = torch.zeros(shape, device=device), torch.ones(shape, device=device)
    first, second = (t.clone().requires_grad_() for t in (ones, 1000 * ones))
    torch.manual_seed(5)
    out = add_dropped(zeros, (first, second), p)
    kept_second = out.detach() > 500
    kept_first = out.detach() - kept_second * 1000 / (1 - p) > 0.5
    d_first, d_second = torch.autograd.grad(out, [first, second], ones)
    torch.testing.assert_close(d_first, kept_first / (1 - p))
    torch.testing.assert_close(d_second, kept_second / (1 - p))
    count = kept_first.numel()
    for share, expected in (
        (kept_first, 1 - p),
        (kept_second, 1 - p),
        (kept_first & kept_second, (1 - p) ** 2),
        (kept_first[:, 1:] & kept_first[:, :-1], (1 - p) ** 2),
        (kept_first[1:] & kept_first[:-1], (1 - p) ** 2),
    ):
        # Five standard deviations of a fair count.
        assert abs(share.float().mean().item() - expected) < 5 * (expected * (1 - expected) / count) ** 0.5
    # The generator's state decides: the same again, another afterwards.
    following = add_dropped(zeros, (first, second), p)
    torch.manual_seed(5)
    assert torch.equal(add_dropped(zeros, (first, second), p), out)
    assert torch.equal(add_dropped(zeros, (first, second), p), following)
    assert not torch.equal(out, following)


def check_refusals(device: str) -> None:
    from elite.kernels.residual.kernel import add_dropped

    x = torch.ones(2, 3, device=device)
    with pytest.raises(ValueError, match="one or two"):
        add_dropped(x, (x, x, x), 0.1)
    with pytest.raises(ValueError, match="one or two"):
        add_dropped(x, (x[:1],), 0.1)
    with pytest.raises(ValueError, match="probability"):
        add_dropped(x, (x,), 1.0)


@pytest.mark.parametrize("check", ["check_sums", "check_masks", "check_refusals"])
def test_kernel_in_the_interpreter(check: str) -> None:
    run_interpreted("tests.kernels.test_residual", check)


@pytest.mark.gpu
@pytest.mark.parametrize("check", [check_sums, check_masks, check_refusals])
def test_kernel_on_a_gpu(check: object) -> None:
    assert callable(check)
    check("cuda")


@pytest.mark.gpu
def test_no_seed_costs_a_compilation() -> None:
    from elite.kernels.residual import kernel

    def compiled() -> int:
        return sum(len(caches[0]) for caches in kernel._kernel.device_caches.values())

    x = torch.ones(64, device="cuda")
    counts = []
    for seed in (2**40 + 1, 2**40, 2**40 + 8, 2**41):
        kernel._launch(x, [x, x], torch.empty_like(x), 0.5, [seed, seed + 3], backward=False)
        counts.append(compiled())
    assert counts[0] > 0 and len(set(counts)) == 1
