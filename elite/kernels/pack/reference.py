"""What the kernels compute, in plain torch: two encodings of rows of values as rows of bytes, all in fp32.

8 bits: groups of 64 values as integers c = round(x / s), s = max |x| / 127 of the group in bf16. Where a value is not finite, its group's s
is NaN and the codes are 0.

    row: scales [2 × groups bytes], integers [width bytes], zeros up to a multiple of 4 bytes

4.5 bits: c = round(x / step) with its sign folded in (0, −1, 1, −2, … → 0, 1, 2, 3, …); the two low bits are stored as they are, the
quotient q = folded >> 2 as q zeros and a one. Each row gets the finest step with which its quotients fit, found by bisection: the code
length depends on Σ|x|, so a few huge values cost little. What is stored is the least-squares step for the codes, in bf16, NaN where Σ|x| is
not finite; such a row's codes are 0.

    row: step [2 bytes], low bits [⌈width / 4⌉ bytes], unary quotients [the rest, a multiple of 4 bytes in all]

Bytes, and bits in them, are filled from their lowest end. A quotient by a step or scale is a product with its reciprocal, which is rounded
once a row or group: kernels then agree to the bit without a division per value.

Source: Golomb 1966; Rice 1979; the layout (low bits apart from a unary bit vector) is Elias 1974 and Fano 1971.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
"""Values that share a scale in the 8-bit code."""
LOW_BITS = 2
BISECTIONS = 10
"""Steps of 2.4 octaves at most / 2¹⁰: a coarser step by 0.2 % at most."""
SMALLEST = 1e-30
"""Least scale, and least mean magnitude of a row, that is told from zero: far from where fp32 loses digits."""


def int8_row_bytes(width: int) -> int:
    """Bytes of one row of `width` values in 8 bits each."""
    return _ceil(2 * _ceil(width, GROUP) + width, 4) * 4


def int4_row_bytes(width: int) -> int:
    """Bytes of one row of `width` values in 4.5 bits each."""
    # 4.5 bits are 9/16 byte; a few values need room for their unary ends besides the step.
    return max(12, _ceil(9 * width, 64) * 4)


def int4_layout(width: int) -> tuple[int, int, int]:
    """Bytes of low bits, bits of unary code in a row, and what the row's quotients may sum to."""
    low_bytes = _ceil(width * LOW_BITS, 8)
    unary_bits = 8 * (int4_row_bytes(width) - 2 - low_bytes)
    return low_bytes, unary_bits, unary_bits - width


def int4_bracket(width: int) -> tuple[float, float]:
    """Divisors of Σ|x| that give a step finer and a step coarser than the one sought.

    With m = round(|x| / step), m/2 − 1 ≤ q ≤ m/2 and q = 0 below m = 2 give |x| / 2 step − 5/4 ≤ q ≤ 2|x| / 3 step. So the coarser step
    fits always.
    """
    room = int4_layout(width)[2]
    return 2 * room + 2.5 * width, 1.5 * room


def encode_int8(x: Tensor, out: Tensor) -> None:
    """Write x [n, width] of any float dtype to `out` [n, int8_row_bytes(width)], uint8."""
    n, width = x.shape
    grouped = F.pad(x.float(), (0, -width % GROUP)).view(n, -1, GROUP)
    # 0 / 0 would be NaN.
    scale = (grouped.abs().amax(-1) / 127).clamp_min(SMALLEST).bfloat16()
    finite = scale.isfinite()
    steps = torch.where(finite[..., None], grouped * scale.float().reciprocal()[..., None], 0)
    codes = steps.round_().clamp_(-127, 127).to(torch.int8).view(n, -1)
    scale = torch.where(finite, scale, torch.nan)
    out.copy_(_joined(out.shape[1], scale.view(torch.uint8), codes[:, :width].view(torch.uint8)))


def decode_int8(rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Values [n, width] of `dtype` from rows [n, int8_row_bytes(width)]."""
    groups = _ceil(width, GROUP)
    scale = rows[:, : 2 * groups].contiguous().view(torch.bfloat16).float()
    codes = rows[:, 2 * groups : 2 * groups + width].view(torch.int8).float()
    return _finite(codes * scale.repeat_interleave(GROUP, dim=1)[:, :width], dtype)


def encode_int4(x: Tensor, out: Tensor) -> None:
    """Write x [n, width] of any float dtype to `out` [n, int4_row_bytes(width)], uint8."""
    x = x.float()
    n, width = x.shape
    _, unary_bits, room = int4_layout(width)
    # Rows of zeros get a step too.
    total = x.abs().sum(1, keepdim=True).clamp_min(SMALLEST * width)
    codes = torch.where(total.isfinite(), _codes(x, _finest_step(x, total, room)), 0)
    step = (x * codes).sum(1, keepdim=True) / codes.float().square().sum(1, keepdim=True).clamp_min(1)
    step = torch.where(total.isfinite(), step.bfloat16(), torch.nan)
    folded = _folded(codes)
    ends = ((folded >> LOW_BITS) + 1).cumsum(1) - 1
    unary = torch.zeros(n, unary_bits, dtype=torch.uint8, device=x.device).scatter_(1, ends, 1)
    low = _packed((folded & (1 << LOW_BITS) - 1).to(torch.uint8), LOW_BITS)
    out.copy_(_joined(out.shape[1], step.view(torch.uint8), low, _packed(unary, 1)))


def decode_int4(rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Values [n, width] of `dtype` from rows [n, int4_row_bytes(width)]."""
    low_bytes, _, _ = int4_layout(width)
    step = rows[:, :2].contiguous().view(torch.bfloat16).float()
    low = _unpacked(rows[:, 2 : 2 + low_bytes], LOW_BITS)[:, :width]
    ones = _unpacked(rows[:, 2 + low_bytes :], 1).cumsum(1, dtype=torch.int32)
    order = torch.arange(1, width + 1, dtype=torch.int32, device=rows.device).expand(rows.shape[0], width).contiguous()
    # Where the count of ones first reaches i, value i ends.
    ends = torch.searchsorted(ones, order, out_int32=True)
    quotients = ends.diff(dim=1, prepend=ends.new_full((1, 1), -1).expand(rows.shape[0], 1)) - 1
    folded = quotients << LOW_BITS | low
    return _finite(((folded >> 1) ^ -(folded & 1)) * step, dtype)


def _finest_step(x: Tensor, total: Tensor, room: int) -> Tensor:
    """Step of each row [n, 1], about the smallest whose quotients sum to `room` at most; `total` [n, 1] is Σ|x|."""
    fine, coarse = (total / divisor for divisor in int4_bracket(x.shape[1]))
    for _ in range(BISECTIONS):
        # Their product could underflow.
        step = fine.sqrt() * coarse.sqrt()
        fits = (_folded(_codes(x, step)) >> LOW_BITS).sum(1, keepdim=True) <= room
        fine, coarse = torch.where(fits, fine, step), torch.where(fits, step, coarse)
    return coarse


def _codes(x: Tensor, step: Tensor) -> Tensor:
    """x in whole steps, int32."""
    return (x * step.reciprocal()).round_().to(torch.int32)


def _folded(codes: Tensor) -> Tensor:
    """0, −1, 1, −2, … as 0, 1, 2, 3, …"""
    return (codes << 1) ^ (codes >> 31)


def _finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as `dtype`: one at the edge of fp16 must not become infinite by half a step."""
    edge = torch.finfo(dtype).max
    return values.clamp_(-edge, edge).to(dtype)


def _packed(values: Tensor, bits: int) -> Tensor:
    """uint8 values [n, m] of `bits` bits each as bytes [n, ⌈m · bits / 8⌉], lowest bits first."""
    per_byte = 8 // bits
    shifts = bits * torch.arange(per_byte, dtype=torch.uint8, device=values.device)
    return (F.pad(values, (0, -values.shape[1] % per_byte)).view(values.shape[0], -1, per_byte) << shifts).sum(-1, dtype=torch.uint8)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_packed`, up to its padding."""
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts & (1 << bits) - 1).flatten(1)


def _joined(row_bytes: int, *parts: Tensor) -> Tensor:
    """Bytes side by side, filled up with zeros."""
    joined = torch.cat(parts, 1)
    return F.pad(joined, (0, row_bytes - joined.shape[1]))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
