"""The kernel and its reference against a sum head by head; under the interpreter on a CPU, in a process of its own."""

import pytest
import torch
from torch import Tensor

from elite.executor.streamed.math_kernel import group_sum
from tests.kernels.interpreter import run_interpreted

SHAPES = [(5, 6, 3, 80), (40, 8, 1, 64), (33, 2, 2, 8)]
"""Keys, query heads, key heads, head dimension."""


def values(keys: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of every query head, what was there before, and the sum of both; in fp64."""
    generator = torch.Generator().manual_seed(0)
    more, base = (torch.randn(keys, n, dim, generator=generator, dtype=torch.float64) for n in (heads, kv_heads))
    total, group = base.clone(), heads // kv_heads
    for head in range(heads):
        total[:, head // group] += more[:, head]
    return more, base, total


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_cpu_runs(shape: tuple[int, int, int, int]) -> None:
    more, base, total = values(*shape)
    kv_heads = shape[2]
    torch.testing.assert_close(group_sum(more, kv_heads, base), total)
    torch.testing.assert_close(group_sum(more, kv_heads), total - base)
    assert group_sum(more.bfloat16(), kv_heads).dtype is torch.float32
    there = base.clone()
    assert group_sum(more, kv_heads, there, there) is there
    torch.testing.assert_close(there, total)


def check_kernel(device: str) -> None:
    from elite.kernels.group_sum.kernel import group_sum as kernel

    for shape in SHAPES:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
            more, base, total = (t.to(device) for t in values(*shape))
            # An attention kernel's gradients lie head by head.
            by_head = more.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
            out = torch.empty_like(base, dtype=dtype)
            kernel(by_head, None, out)
            torch.testing.assert_close(out.double(), total - base, rtol=tolerance, atol=5 * tolerance)
            there = base.float()
            kernel(by_head, there, there)
            torch.testing.assert_close(there.double(), total, rtol=tolerance, atol=5 * tolerance)


def test_kernel_in_the_interpreter() -> None:
    run_interpreted("tests.kernels.test_group_sum", "check_kernel")


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    check_kernel("cuda")
