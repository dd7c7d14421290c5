"""Boundaries as rows of bytes: exactly, with 8 bits a value, with 4.5 bits a value, everything included.

A row is encoded by itself, so any range of rows can be read back. All arithmetic is fp32, on the rows' device, without waiting for it.

The 4.5-bit code is an entropy code. After a fixed-rate code of 4 bits most of a boundary's error comes from its shape: a few channels hold
more than half of a row's energy, so a grid that covers them is coarse for the rest, and rotations only spread that out. A Golomb–Rice code
spends bits where values are large instead, needs neither rotation nor a list of outliers, and its two parts, fixed low bits and a unary
rest, are both packed and unpacked without a loop over values.

Source: Golomb 1966; Rice 1979; the layout (low bits apart from a unary bit vector) is Elias 1974 and Fano 1971.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from elite.streaming import BoundaryEncoding

TILE_VALUES = 1 << 21
"""Values worked on at once: bounds temporaries to about 100 MB."""

SMALLEST = 1e-30
"""Least mean magnitude of a row that is told from zero: far from where fp32 loses digits."""


class Encoding(ABC):
    """How rows of values become rows of bytes."""

    @abstractmethod
    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        """Bytes of one stored row of `width` values."""

    @abstractmethod
    def encode(self, x: Tensor, out: Tensor) -> None:
        """Write x [n, width] of any float dtype as bytes to `out` [n, row_bytes], uint8 on the same device."""

    @abstractmethod
    def decode(self, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Values [n, width] of `dtype` from the bytes [n, row_bytes] that `encode` wrote."""


class Exact(Encoding):
    """The bytes themselves."""

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        return width * dtype.itemsize

    def encode(self, x: Tensor, out: Tensor) -> None:
        out.copy_(x.contiguous().view(torch.uint8))

    def decode(self, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        return rows.contiguous().view(dtype)


class Tiled(Encoding):
    """A lossy encoding that works on a few rows at once."""

    def encode(self, x: Tensor, out: Tensor) -> None:
        for tile in _tiles(x.shape[0], x.shape[1]):
            self._encode(x[tile].float(), out[tile])

    def decode(self, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        x = torch.empty(rows.shape[0], width, dtype=dtype, device=rows.device)
        # A value at the edge of fp16 must not become infinite by half a step.
        edge = torch.finfo(dtype).max
        for tile in _tiles(rows.shape[0], width):
            x[tile] = self._decode(rows[tile], width).clamp_(-edge, edge)
        return x

    @abstractmethod
    def _encode(self, x: Tensor, out: Tensor) -> None:
        """`encode` of one tile; x is fp32."""

    @abstractmethod
    def _decode(self, rows: Tensor, width: int) -> Tensor:
        """`decode` of one tile, fp32."""


class Int8(Tiled):
    """Groups of 64 values as 8-bit integers, each with its largest magnitude / 127 in bf16: 8.25 bits a value.

    Row: scales [2 × groups bytes], integers [width bytes], padding to 4 bytes.
    """

    GROUP = 64

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        return _ceil(2 * _ceil(width, self.GROUP) + width, 4) * 4

    def _encode(self, x: Tensor, out: Tensor) -> None:
        n, width = x.shape
        grouped = F.pad(x, (0, -width % self.GROUP)).view(n, -1, self.GROUP)
        # 0 / 0 would be NaN.
        scale = (grouped.abs().amax(-1) / 127).clamp_min(SMALLEST).bfloat16()
        codes = (grouped / scale.float()[..., None]).round_().clamp_(-127, 127).to(torch.int8).view(n, -1)
        out.copy_(_joined(out.shape[1], scale.view(torch.uint8), codes[:, :width].view(torch.uint8)))

    def _decode(self, rows: Tensor, width: int) -> Tensor:
        groups = _ceil(width, self.GROUP)
        scale = rows[:, : 2 * groups].contiguous().view(torch.bfloat16).float()
        codes = rows[:, 2 * groups : 2 * groups + width].view(torch.int8).float()
        return codes * scale.repeat_interleave(self.GROUP, dim=1)[:, :width]


class Int4(Tiled):
    """Uniform steps, Golomb–Rice coded: 4.5 bits a value, scales and padding included.

    A value is round(x / step); with its sign folded in (0, −1, 1, −2, … → 0, 1, 2, 3, …) the two low bits are stored as they are, the
    quotient q = code >> 2 as q zeros and a one. Each row gets the finest step with which its quotients fit, found by bisection: the code
    length depends on Σ|x|, so a few huge values cost little. What is stored is the least-squares step for the codes, in bf16.

    Row: step [2 bytes], low bits [⌈width / 4⌉ bytes], unary quotients [the rest].
    """

    LOW_BITS = 2
    BISECTIONS = 10
    """Steps of 2.4 octaves at most / 2¹⁰: a coarser step by 0.2 % at most."""

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        # 4.5 bits are 9/16 byte; a few values need room for their unary ends besides the step.
        return max(12, _ceil(9 * width, 64) * 4)

    def _encode(self, x: Tensor, out: Tensor) -> None:
        n, width = x.shape
        _, unary_bits = self._layout(width, out.shape[1])
        codes = _steps(x, self._finest_step(x, unary_bits - width))
        step = (x * codes).sum(1, keepdim=True) / codes.float().square().sum(1, keepdim=True).clamp_min(1)
        folded = _folded(codes)
        quotients = (folded >> self.LOW_BITS).clamp_(0, unary_bits)
        # Ends beyond the row exist only where values are not finite; they must not be written elsewhere.
        ends = ((quotients + 1).cumsum(1) - 1).clamp_max_(unary_bits - 1)
        unary = torch.zeros(n, unary_bits, dtype=torch.uint8, device=x.device).scatter_(1, ends, 1)
        low = _packed((folded & (1 << self.LOW_BITS) - 1).to(torch.uint8), self.LOW_BITS)
        out.copy_(_joined(out.shape[1], step.bfloat16().view(torch.uint8), low, _packed(unary, 1)))

    def _decode(self, rows: Tensor, width: int) -> Tensor:
        low_bytes, _ = self._layout(width, rows.shape[1])
        step = rows[:, :2].contiguous().view(torch.bfloat16).float()
        low = _unpacked(rows[:, 2 : 2 + low_bytes], self.LOW_BITS)[:, :width]
        ones = _unpacked(rows[:, 2 + low_bytes :], 1).cumsum(1, dtype=torch.int32)
        order = torch.arange(1, width + 1, dtype=torch.int32, device=rows.device).expand(rows.shape[0], width).contiguous()
        # Where the count of ones first reaches i, value i ends.
        ends = torch.searchsorted(ones, order, out_int32=True)
        quotients = ends.diff(dim=1, prepend=ends.new_full((1, 1), -1).expand(rows.shape[0], 1)) - 1
        folded = quotients << self.LOW_BITS | low
        return ((folded >> 1) ^ -(folded & 1)) * step

    def _layout(self, width: int, row_bytes: int) -> tuple[int, int]:
        """Bytes of low bits and bits of unary code in a row."""
        low_bytes = _ceil(width * self.LOW_BITS, 8)
        return low_bytes, 8 * (row_bytes - 2 - low_bytes)

    def _finest_step(self, x: Tensor, room: int) -> Tensor:
        """Step of each row [n, 1], about the smallest whose quotients sum to `room` at most.

        With m = round(|x| / step), m/2 − 1 ≤ q ≤ m/2 and q = 0 below m = 2 give |x| / 2 step − 5/4 ≤ q ≤ 2|x| / 3 step: the bracket.
        """
        # Rows of zeros get a step too.
        total = x.abs().sum(1, keepdim=True).clamp_min(SMALLEST * x.shape[1])
        fine, coarse = total / (2 * room + 2.5 * x.shape[1]), total / (1.5 * room)
        for _ in range(self.BISECTIONS):
            # Their product could underflow.
            step = fine.sqrt() * coarse.sqrt()
            fits = (_folded(_steps(x, step)) >> self.LOW_BITS).sum(1, keepdim=True) <= room
            fine, coarse = torch.where(fits, fine, step), torch.where(fits, step, coarse)
        return coarse


ENCODINGS: dict[BoundaryEncoding, Encoding] = {
    BoundaryEncoding.exact: Exact(),
    BoundaryEncoding.int8: Int8(),
    BoundaryEncoding.int4: Int4(),
}


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _tiles(n: int, width: int) -> Iterator[slice]:
    """Ranges of rows with about TILE_VALUES values each."""
    size = max(1, TILE_VALUES // width)
    return (slice(start, start + size) for start in range(0, n, size))


def _steps(x: Tensor, step: Tensor) -> Tensor:
    """x in whole steps, int32."""
    return (x / step).round_().to(torch.int32)


def _folded(codes: Tensor) -> Tensor:
    """0, −1, 1, −2, … as 0, 1, 2, 3, …"""
    return (codes << 1) ^ (codes >> 31)


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
