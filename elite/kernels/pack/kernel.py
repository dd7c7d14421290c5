"""Both encodings in one pass each way, where plain torch makes dozens. Layouts and formulas are those of `reference.py`.

8 bits: a program takes TILE groups, wherever rows end.

4.5 bits, encoding: a program takes a row, holds its values while it bisects, and sets the row to zero; everything is then added to its
32-bit words. Value i's unary code ends at bit e_i = Σ_{j ≤ i} (q_j + 1) − 1. One addition a value would do; with c_i = Σ_{j ≤ i} 2^(e_j mod
32), wrapping, a word's bits are the difference of two c: its last end adds c_i, its first end takes off what c was before it.

4.5 bits, decoding: a program takes a row. A one in the unary code is the end of the value whose index is the number of ones before it; its
position is written where the value will be. The bits between two ends are then a quotient.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from elite.kernels.launch import UNFUSED, Launch
from elite.kernels.pack import reference

MOST_WIDTH = 2**14
"""Values of a row that the 4.5-bit encoder may hold; positions in its unary code fit 16 bits."""
TILE = 32
"""Groups of a program of the 8-bit code."""
WORDS = 64
"""Words of unary code in which a program looks for ends at once."""
VALUES = 1024
"""Values that it decodes at once."""
GROUP: tl.constexpr = tl.constexpr(reference.GROUP)
BISECTIONS: tl.constexpr = tl.constexpr(reference.BISECTIONS)
SMALLEST: tl.constexpr = tl.constexpr(reference.SMALLEST)
SHIFT: tl.constexpr = tl.constexpr(1.5 * 2**23)
"""fp32 numbers near it are whole: adding it rounds half to even and leaves the integer in the low bits, for |y| < 2²²."""
SHIFT_BITS: tl.constexpr = tl.constexpr(0x4B400000)
NAN_HALF: tl.constexpr = tl.constexpr(0x7FC0)
"""NaN in bf16."""


@triton.jit
def _rounded(y):
    """The integer next to y, ties to even."""
    return (y + SHIFT).to(tl.int32, bitcast=True) - SHIFT_BITS


@triton.jit
def _half(y):
    """The bits of y, not NaN, in bf16, as int32; by integers since not every GPU has bf16."""
    bits = y.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@triton.jit
def _widened(half):
    """fp32 of the bits of a bf16 number."""
    return (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _bounded(y, edge):
    """y between −edge and edge; NaN stays NaN."""
    return tl.where(y > edge, edge, tl.where(y < -edge, -edge, y))


@triton.jit
def _ones(word):
    """Set bits of uint32 words. In the form that compilers know."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _groups_of(program, count, groups, TILE: tl.constexpr):
    """Row and index within it of a program's groups, and which exist."""
    first = program.to(tl.int64) * TILE
    # Only the program's first group needs a 64-bit division.
    local = (first % groups).to(tl.int32) + tl.arange(0, TILE)
    return first // groups + local // groups, local % groups, first + tl.arange(0, TILE) < count


@triton.jit
def _encode_int8(x, codes, scales, count, groups, width, row_bytes, scale_bytes, x_stride, row_stride, TILE: tl.constexpr):
    row, group, exists = _groups_of(tl.program_id(0), count, groups, TILE)
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = exists[:, None] & (columns < width)
    values = tl.load(x + row[:, None] * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    # As integers, for which NaN is larger than all else.
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    most = tl.div_rn(bits.to(tl.float32, bitcast=True), tl.full([TILE], 127.0, tl.float32))
    finite = bits < 0x7F800000
    half = tl.where(finite, _half(tl.where(most < SMALLEST, SMALLEST, most)), NAN_HALF)
    tl.store(scales + row * (row_stride // 2) + group, half.to(tl.int16), mask=exists)
    inverse = tl.div_rn(tl.full([TILE], 1.0, tl.float32), _widened(half))
    rounded = tl.minimum(tl.maximum(_rounded(values * inverse[:, None]), -127), 127)
    target = codes + row * row_stride + scale_bytes
    tl.store(target[:, None] + columns, tl.where(finite[:, None], rounded, 0).to(tl.int8), mask=inside)
    padding = width + tl.arange(0, 4)[None, :]
    unused = (exists & (group == groups - 1))[:, None] & (padding < row_bytes - scale_bytes)
    tl.store(target[:, None] + padding, tl.zeros([TILE, 4], tl.int8), mask=unused)


@triton.jit
def _decode_int8(codes, scales, x, count, groups, width, scale_bytes, row_stride, edge, TILE: tl.constexpr):
    row, group, exists = _groups_of(tl.program_id(0), count, groups, TILE)
    columns = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = exists[:, None] & (columns < width)
    scale = _widened(tl.load(scales + row * (row_stride // 2) + group, mask=exists, other=0))
    values = tl.load(codes + (row * row_stride + scale_bytes)[:, None] + columns, mask=inside, other=0).to(tl.float32)
    values = _bounded(values * scale[:, None], edge)
    tl.store(x + row[:, None] * width + columns, values.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _codes(x, columns, width, inverse, finite):
    """Codes of the values at `columns`, 0 beyond the row and where it is not finite."""
    values = tl.load(x + columns, mask=columns < width, other=0.0).to(tl.float32)
    return tl.where(finite, _rounded(values * inverse), 0)


@triton.jit
def _quotient(code):
    """Folded code >> 2: the folded code is 2c or 2(−1 − c) + 1."""
    return (code ^ (code >> 31)) >> 1


@triton.jit
def _encode_int4(
    x, words, width, row_words, low_bytes, room, x_stride, row_stride, least, finer, coarser,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    words += row * (row_stride // 4)
    cleared = tl.arange(0, WORDS)
    tl.store(words + cleared, tl.zeros([WORDS], tl.int32), mask=cleared < row_words)

    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(tl.abs(values), 0)
    finite = total < float("inf")
    values = tl.where(finite, values, 0.0)
    total = tl.where(finite & (total > least), total, least)
    one = tl.full([], 1.0, tl.float32)
    fine, coarse = tl.div_rn(total, finer), tl.div_rn(total, coarser)
    for _ in range(BISECTIONS):
        step = tl.sqrt_rn(fine) * tl.sqrt_rn(coarse)
        fits = tl.sum(_quotient(_rounded(values * tl.div_rn(one, step))), 0) <= room
        fine, coarse = tl.where(fits, fine, step), tl.where(fits, step, coarse)
    inverse = tl.div_rn(one, coarse)
    code = _rounded(values * inverse)
    whole = code.to(tl.float32)
    squares = tl.sum(whole * whole, 0)
    step = tl.div_rn(tl.sum(values * whole, 0), tl.where(squares < 1.0, 1.0, squares))
    # All threads' zeros lie before anything is added to them.
    tl.debug_barrier()
    tl.atomic_add(words, tl.where(finite, _half(step), NAN_HALF), sem="relaxed")

    # Low bits of eight values at a time fill 16 bits, half a word; the first half word holds the step.
    eighths = tl.arange(0, BLOCK // 8)
    low = tl.zeros([BLOCK // 8], tl.int32)
    for k in tl.static_range(8):
        other = _codes(x, eighths * 8 + k, width, inverse, finite)
        low |= (((other << 1) ^ (other >> 31)) & 3) << (2 * k)
    tl.atomic_add(words + ((eighths + 1) >> 1), low << (16 * ((eighths + 1) & 1)), mask=eighths * 8 < width, sem="relaxed")

    quotient = _quotient(code)
    end = 8 * (2 + low_bytes) - 1 + tl.cumsum(tl.where(inside, quotient + 1, 0), 0)
    word = end >> 5
    own = tl.full([BLOCK], 1, tl.int32) << (end & 31)
    upto = tl.cumsum(tl.where(inside, own, 0), 0)
    is_first = inside & ((columns == 0) | (((end - quotient - 1) >> 5) != word))
    following = end + 1 + _quotient(_codes(x, columns + 1, width, inverse, finite))
    is_last = inside & ((columns == width - 1) | ((following >> 5) != word))
    tl.atomic_add(words + word, own - upto, mask=is_first, sem="relaxed")
    tl.atomic_add(words + word, upto, mask=is_last, sem="relaxed")


@triton.jit
def _decode_int4(
    words, low, halves, x, ends, width, row_words, low_bytes, row_stride, edge, WORDS: tl.constexpr, VALUES: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    words += row * (row_stride // 4)
    low += row * row_stride + 2
    x += row * width
    ends += row * width
    # The low bits may reach into the first word of unary code.
    first, shared_bits = (2 + low_bytes) >> 2, 8 * ((2 + low_bytes) & 3)
    bit = tl.arange(0, 32)[None, :]
    below = ((tl.full([1, 32], 1, tl.int32) << bit) - 1).to(tl.uint32, bitcast=True)
    rank = 0
    for start in range(first, row_words, WORDS):
        index = start + tl.arange(0, WORDS)
        word = tl.load(words + index, mask=index < row_words, other=0).to(tl.uint32, bitcast=True)
        word = tl.where(index == first, word >> shared_bits << shared_bits, word)
        count = _ones(word)
        value = (rank + tl.cumsum(count, 0) - count)[:, None] + _ones(word[:, None] & below)
        position = 32 * (index[:, None] - first) - shared_bits + bit
        is_end = (((word[:, None] >> bit) & 1) != 0) & (value < width)
        tl.store(ends + value, position.to(ends.dtype.element_ty), mask=is_end)
        rank += tl.sum(count, 0)

    step = _widened(tl.load(halves + row * (row_stride // 2)))
    # From the last to the first, so that the end before a block still lies there when the block is written over.
    for block in range(tl.cdiv(width, VALUES) - 1, -1, -1):
        value = block * VALUES + tl.arange(0, VALUES)
        inside = value < width
        tl.debug_barrier()
        end = tl.load(ends + value, mask=inside, other=0).to(tl.int32) & 0xFFFF
        before = tl.load(ends + value - 1, mask=inside & (value > 0), other=0).to(tl.int32) & 0xFFFF
        quotient = end - tl.where(value > 0, before, -1) - 1
        packed = tl.load(low + (value >> 2), mask=inside, other=0).to(tl.int32)
        folded = (quotient << 2) | ((packed >> (2 * (value & 3))) & 3)
        decoded = _bounded(((folded >> 1) ^ -(folded & 1)).to(tl.float32) * step, edge)
        tl.debug_barrier()
        tl.store(x + value, decoded.to(x.dtype.element_ty), mask=inside)


# Encoders round a product before SHIFT is added, as the reference does.
_encode_int8_launch = Launch(_encode_int8, TILE=TILE, **UNFUSED)
_decode_int8_launch = Launch(_decode_int8, TILE=TILE)
_decode_int4_launch = Launch(_decode_int4, WORDS=WORDS, VALUES=VALUES)


@cache
def _encode_int4_launch(width: int) -> Launch:
    return Launch(_encode_int4, **_sizes(width), **UNFUSED)


def encode_int8(x: Tensor, out: Tensor) -> None:
    """As `reference.encode_int8`, for fp32, bf16 and fp16."""
    (n, width), groups = x.shape, triton.cdiv(x.shape[1], reference.GROUP)
    if n == 0:
        return
    x, rows = x if x.stride(1) == 1 else x.contiguous(), _aligned(out)
    _encode_int8_launch(
        (triton.cdiv(n * groups, TILE),),
        (x, rows.view(torch.int8), rows.view(torch.int16)),
        (n * groups, groups, width, rows.shape[1], 2 * groups, x.stride(0), rows.stride(0)),
    )
    if rows is not out:
        out.copy_(rows)


def decode_int8(rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """As `reference.decode_int8`, for fp32, bf16 and fp16."""
    n, groups = rows.shape[0], triton.cdiv(width, reference.GROUP)
    x = torch.empty(n, width, dtype=dtype, device=rows.device)
    if n:
        rows = _aligned(rows)
        _decode_int8_launch(
            (triton.cdiv(n * groups, TILE),),
            (rows.view(torch.int8), rows.view(torch.int16), x),
            (n * groups, groups, width, 2 * groups, rows.stride(0)),
            (torch.finfo(dtype).max,),
        )
    return x


def encode_int4(x: Tensor, out: Tensor) -> None:
    """As `reference.encode_int4`, for fp32, bf16 and fp16.

    Raises:
        ValueError: rows are wider than a program can hold.
    """
    n, width = x.shape
    _check(width)
    if n == 0:
        return
    low_bytes, _, room = reference.int4_layout(width)
    x, rows = x if x.stride(1) == 1 else x.contiguous(), _aligned(out)
    _encode_int4_launch(width)(
        (n,),
        (x, rows.view(torch.int32)),
        (width, rows.shape[1] // 4, low_bytes, room, x.stride(0), rows.stride(0)),
        (reference.SMALLEST * width, *reference.int4_bracket(width)),
    )
    if rows is not out:
        out.copy_(rows)


def decode_int4(rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """As `reference.decode_int4`, for fp32, bf16 and fp16.

    Raises:
        ValueError: rows are wider than those that can be encoded.
    """
    _check(width)
    x = torch.empty(rows.shape[0], width, dtype=dtype, device=rows.device)
    if len(x):
        rows, low_bytes = _aligned(rows), reference.int4_layout(width)[0]
        ends = x.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
        _decode_int4_launch(
            (len(x),),
            (rows.view(torch.int32), rows, rows.view(torch.int16), x, ends),
            (width, rows.shape[1] // 4, low_bytes, rows.stride(0)),
            (torch.finfo(dtype).max,),
        )
    return x


def _check(width: int) -> None:
    if width > MOST_WIDTH:
        raise ValueError(f"4.5-bit code of {width:,} values: the kernels take at most {MOST_WIDTH:,}")


def _aligned(rows: Tensor) -> Tensor:
    """These rows if each is a run of 32-bit words, else a copy of them."""
    whole = rows.stride(1) == 1 and rows.stride(0) % 4 == 0 and rows.storage_offset() % 4 == 0 and rows.data_ptr() % 4 == 0
    return rows if whole else rows.clone(memory_format=torch.contiguous_format)


def _sizes(width: int) -> dict[str, int]:
    """Blocks and warps for rows of this width: about 16 values a thread."""
    block = triton.next_power_of_2(max(width, 16))
    words = triton.next_power_of_2(reference.int4_row_bytes(width) // 4)
    return {"BLOCK": block, "WORDS": words, "num_warps": min(16, max(1, block // 512))}
