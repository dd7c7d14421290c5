"""The kernel and its reference against bitsandbytes, bit for bit; under the interpreter on a CPU, in a process of its own."""

import bitsandbytes.functional as bnb
import pytest
import torch

from elite.kernels.dequantise import reference
from elite.kernels.dequantise.reference import Packed
from tests.kernels.interpreter import run_interpreted

SHAPES = [(96, 192), (300, 64), (33, 320)]
"""The first two have more blocks than share a coarse scale, and more than a program takes."""


def packed(shape: tuple[int, int], device: str) -> tuple[Packed, torch.Tensor, torch.Tensor]:
    """A matrix as bitsandbytes packs it, as it makes it whole again, and the original."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    q, state = bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=True, quant_type="nf4")
    made = Packed(q, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset)
    return made, bnb.dequantize_4bit(q, state), matrix


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_bitsandbytes(shape: tuple[int, int]) -> None:
    made, whole, matrix = packed(shape, "cpu")
    assert torch.equal(reference.dequantised(made, torch.empty(shape)), whole)
    assert 0 < (whole - matrix).norm() / matrix.norm() < 0.15


def check_kernel(device: str) -> None:
    from elite.kernels.dequantise.kernel import dequantised

    for shape in SHAPES:
        made, whole, _ = packed(shape, device)
        # The interpreter cuts bf16 off where a GPU rounds.
        for dtype in (torch.float32, torch.float16, *((torch.bfloat16,) if device != "cpu" else ())):
            # In the columns of wider rows.
            around = torch.full((shape[0], shape[1] + 16), 7.0, dtype=dtype, device=device)
            out = dequantised(made, around[:, : shape[1]])
            assert out.data_ptr() == around.data_ptr() and torch.equal(out, whole.to(dtype)) and bool((around[:, shape[1] :] == 7).all())
    assert dequantised(made, torch.empty(0, 64, device=device)).shape == (0, 64)


def test_kernel_is_bitsandbytes() -> None:
    run_interpreted(__name__, "check_kernel")


@pytest.mark.gpu
def test_kernel_on_a_gpu() -> None:
    check_kernel("cuda")
