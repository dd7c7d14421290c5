"""Boundaries as rows of bytes: exactly, with 8 bits a value, with 4.5 bits a value, everything included.

A row is encoded by itself, so any range of rows can be read back. All arithmetic is fp32, on the rows' device, without waiting for it.

The 4.5-bit code is an entropy code. After a fixed-rate code of 4 bits most of a boundary's error comes from its shape: a few channels hold
more than half of a row's energy, so a grid that covers them is coarse for the rest, and rotations only spread that out. A Golomb–Rice code
spends bits where values are large instead, needs neither rotation nor a list of outliers, and its two parts, fixed low bits and a unary
rest, are both packed and unpacked without a loop over values.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from elite.kernels.pack import reference
from elite.streaming import BoundaryEncoding

TILE_VALUES = 1 << 21
"""Values worked on at once without a kernel: bounds temporaries to about 100 MB."""


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


class Packed(Encoding):
    """An encoding of `elite.kernels.pack`: by a kernel all at once, or without one a few rows at once."""

    def encode(self, x: Tensor, out: Tensor) -> None:
        if _has_kernel(x.device, x.dtype):
            from elite.kernels.pack import kernel

            self._encoder(kernel)(x, out)
            return
        for tile in _tiles(x.shape[0], x.shape[1]):
            self._encoder(reference)(x[tile], out[tile])

    def decode(self, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        if _has_kernel(rows.device, dtype):
            from elite.kernels.pack import kernel

            return self._decoder(kernel)(rows, width, dtype)
        x = torch.empty(rows.shape[0], width, dtype=dtype, device=rows.device)
        for tile in _tiles(rows.shape[0], width):
            x[tile] = self._decoder(reference)(rows[tile], width, dtype)
        return x

    @abstractmethod
    def _encoder(self, pack: Any) -> Callable[[Tensor, Tensor], None]:
        """The function of a module of `elite.kernels.pack` that does what `encode` says."""

    @abstractmethod
    def _decoder(self, pack: Any) -> Callable[[Tensor, int, torch.dtype], Tensor]:
        """The one that does what `decode` says."""


class Int8(Packed):
    """Groups of 64 values as 8-bit integers, each with its largest magnitude / 127 in bf16: 8.25 bits a value."""

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        return reference.int8_row_bytes(width)

    def _encoder(self, pack: Any) -> Callable[[Tensor, Tensor], None]:
        return pack.encode_int8

    def _decoder(self, pack: Any) -> Callable[[Tensor, int, torch.dtype], Tensor]:
        return pack.decode_int8


class Int4(Packed):
    """Uniform steps, Golomb–Rice coded, as fine in each row as its values allow: 4.5 bits a value, scales and padding included."""

    def row_bytes(self, width: int, dtype: torch.dtype) -> int:
        return reference.int4_row_bytes(width)

    def _encoder(self, pack: Any) -> Callable[[Tensor, Tensor], None]:
        return pack.encode_int4

    def _decoder(self, pack: Any) -> Callable[[Tensor, int, torch.dtype], Tensor]:
        return pack.decode_int4


ENCODINGS: dict[BoundaryEncoding, Encoding] = {
    BoundaryEncoding.exact: Exact(),
    BoundaryEncoding.int8: Int8(),
    BoundaryEncoding.int4: Int4(),
}


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype is not torch.float64


def _tiles(n: int, width: int) -> Iterator[slice]:
    """Ranges of rows with about TILE_VALUES values each."""
    size = max(1, TILE_VALUES // width)
    return (slice(start, start + size) for start in range(0, n, size))
