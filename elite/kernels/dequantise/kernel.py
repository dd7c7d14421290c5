"""All of it in one pass: bytes, scales and the scales' scales are read, the matrix is written. The formula is that of `reference.py`."""

from math import ceil

import triton
import triton.language as tl
from torch import Tensor

from elite.kernels.dequantise.reference import BLOCK, COARSE, Packed
from elite.kernels.launch import UNFUSED, Launch

BLOCKS = 32
"""Of a program."""
WARPS = 4


@triton.jit
def _kernel(
    q, code, s, scales, coarse, offset, out, blocks, inputs, stride, BLOCK: tl.constexpr, COARSE: tl.constexpr, BLOCKS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    fine = tl.load(s + block, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + fine) * tl.load(coarse + block // COARSE, mask=inside, other=0.0) + tl.load(offset)
    half: tl.constexpr = BLOCK // 2
    byte = tl.load(q + block[:, None] * half + tl.arange(0, half)[None, :], mask=inside[:, None], other=0).to(tl.int32)
    earlier = tl.load(code + (byte >> 4)) * scale[:, None]
    later = tl.load(code + (byte & 15)) * scale[:, None]
    # A block lies within a row.
    first = block * BLOCK
    at = first // inputs * stride + first % inputs
    cells = out + at[:, None] + tl.arange(0, BLOCK)[None, :]
    tl.store(cells, tl.interleave(earlier, later).to(out.dtype.element_ty), mask=inside[:, None])


_launch = Launch(_kernel, BLOCK=BLOCK, COARSE=COARSE, BLOCKS=BLOCKS, num_warps=WARPS, **UNFUSED)


def dequantised(packed: Packed, out: Tensor) -> Tensor:
    """As `reference.dequantised`, for fp32, bf16 and fp16; the values within a row of `out` lie beside each other."""
    assert out.stride(1) == 1 and out.shape[1] % BLOCK == 0
    blocks = out.numel() // BLOCK
    if blocks:
        _launch((ceil(blocks / BLOCKS),), (*packed, out), (blocks, out.shape[1], out.stride(0)))
    return out
