"""The kernel and its reference against attention over all keys at once; under the interpreter on a CPU, in a process of its own."""

import pytest
import torch
from torch import Tensor

from elite.kernels.merge import reference
from tests.kernels.interpreter import run_interpreted

SHAPES = [(5, 3, 80), (40, 2, 64), (1, 1, 8)]


def attended(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o [n, H, D] and L [H, n] by the textbook, in fp64."""
    scores = torch.einsum("nhd,mhd->hnm", q, k)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v), scores.logsumexp(-1)


def parts(queries: int, heads: int, dim: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Attention over two sets of keys, one of them far more attended, and over both."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, dim, generator=generator, dtype=torch.float64) for n in (queries, 30, 30))
    k[:11] *= 3
    halves = (*attended(q, k[:11], v[:11]), *attended(q, k[11:], v[11:]))
    return halves, attended(q, k, v)


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_attention_over_all_keys(shape: tuple[int, int, int]) -> None:
    halves, whole = parts(*shape)
    for made, expected in zip(reference.merge(*halves), whole, strict=True):
        torch.testing.assert_close(made, expected)
    o_a, lse_a, o_b, lse_b = halves
    o, lse = reference.merge(o_a, lse_a, o_b, lse_b, out=o_a)
    assert o is o_a
    torch.testing.assert_close((o, lse), whole)


def check_kernel(device: str) -> None:
    from elite.kernels.merge.kernel import merge

    for shape in SHAPES:
        halves, whole = parts(*shape)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
            o_a, lse_a, o_b, lse_b = (t.to(device) for t in halves)
            # A kernel's output may lie head by head.
            by_head = o_a.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
            o, lse = merge(by_head, lse_a.float(), o_b.to(dtype), lse_b.float())
            torch.testing.assert_close(o.cpu().double(), whole[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(lse.cpu().double(), whole[1], rtol=1e-5, atol=1e-5)
            # In place, in rows of a larger tensor.
            around = o_a.new_zeros(len(o_a) + 2, *o_a.shape[1:], dtype=dtype)
            within = around[1:-1].copy_(o_a)
            again, _ = merge(within, lse_a.float(), o_b.to(dtype), lse_b.float(), out=within)
            torch.testing.assert_close(again, o, rtol=0, atol=0)
            assert again.data_ptr() == within.data_ptr() and not around[0].any() and not around[-1].any()
        nothing = torch.full_like(lse_b, -torch.inf).float()
        kept, _ = merge(o_a.float(), lse_a.float(), torch.zeros_like(o_b).float(), nothing)
        torch.testing.assert_close(kept, o_a.float())


def test_kernel_in_the_interpreter() -> None:
    run_interpreted("tests.kernels.test_merge", "check_kernel")


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    check_kernel("cuda")
