"""Tensors of more than 2³¹ values: the last ones are computed from their own places."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

WIDTH = 4096
ROWS = 2**31 // WIDTH + 3
LAST = 5
"""Rows at the end that are compared."""


def wide() -> Tensor:
    """bf16 [ROWS, WIDTH], 4 GiB; the last rows are random."""
    x = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, device="cuda")
    x[-LAST:] = torch.randn(LAST, WIDTH, device="cuda")
    return x


def norm(x: Tensor) -> Tensor:
    from elite.kernels.norm.kernel import norm as kernel

    return kernel(x, torch.ones(WIDTH, device="cuda", dtype=x.dtype), None, 1e-5, True)[0]


def swiglu(x: Tensor) -> Tensor:
    from elite.kernels.gate.kernel import swiglu as kernel

    return kernel(x, x)


def gelu(x: Tensor) -> Tensor:
    from elite.kernels.gate.kernel import gelu_tanh

    return gelu_tanh(x, torch.ones(WIDTH, device="cuda", dtype=x.dtype))


def residual(x: Tensor) -> Tensor:
    from elite.kernels.residual.kernel import add_dropped

    return add_dropped(x, (x,), 0.0)


def rotary(x: Tensor) -> Tensor:
    from elite.kernels.rotary.kernel import rotary as kernel

    heads = x.view(1, len(x), 32, 128)
    angles = torch.ones(1, 1, 64, device="cuda").expand(1, len(x), 64)
    return kernel(heads, heads[:, :, :1].clone(), angles.cos(), angles.sin())[0].view_as(x)


def cross_entropy(x: Tensor) -> Tensor:
    from elite.kernels.cross_entropy.kernel import cross_entropy as kernel

    kernel(x, torch.zeros(len(x), dtype=torch.int64, device="cuda"), -100, 0.0, True)
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("run", [norm, swiglu, gelu, residual, rotary, cross_entropy])
def test_beyond_32_bits(run: Callable[[Tensor], Tensor]) -> None:
    x = wide()
    few = x[-LAST:].clone()
    assert torch.equal(run(x)[-LAST:], run(few))
