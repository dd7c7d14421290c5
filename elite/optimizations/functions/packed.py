"""Decoder layers whose saved tensors wait as integers.

A saved tensor is packed by its whole storage, which views of it share: rows of a token's values, so that the rows of a view can be read
back alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from elite.kernels.pack import reference
from elite.optimizations.activation_quantization import TILE_VALUES

MOST_WIDTH = 2**14
"""Values of a row that the kernels take; longer ones are halved."""

SAME_VALUES = frozenset({"ToCopyBackward0", "TBackward0", "TransposeBackward0", "ViewBackward0", "UnsafeViewBackward0", "PermuteBackward0"})
"""Functions of autograd whose result has the values of its only argument."""


class Packing:
    """Replaces the layers' forwards by ones whose saved tensors are packed.

    Args:
        bits: 8 or 4.
        width: values a token that a tensor must have.
    """

    def __init__(self, layers: nn.ModuleList, bits: int, width: int) -> None:
        self._layers, self._bits, self._width = layers, bits, width
        self._own = [vars(layer).get("forward") for layer in layers]
        for layer in layers:
            layer.forward = partial(self._run, layer, layer.forward)

    def undo(self) -> None:
        """Give the layers their forwards back."""
        for layer, own in zip(self._layers, self._own, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own

    def _run(self, layer: nn.Module, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(hidden, *args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shelf = _Shelf(hidden.shape[0] * hidden.shape[1], self._bits, self._width, [*layer.parameters(), *layer.buffers(), *given])
        with saved_tensors_hooks(shelf.pack, _unpack):
            return forward(hidden, *args, **kwargs)


class _Rows:
    """A packed storage: rows [n, width] of values as rows of bytes."""

    def __init__(self, tensor: Tensor, width: int, bits: int) -> None:
        storage = tensor.untyped_storage()
        values = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
        self.width, self.dtype, self._bits = width, tensor.dtype, bits
        rows = values.view(-1, width)
        size = reference.int8_row_bytes(width) if bits == 8 else reference.int4_row_bytes(width)
        self._bytes = torch.empty(len(rows), size, dtype=torch.uint8, device=tensor.device)
        module, tiles = _codec(rows)
        encode = module.encode_int8 if bits == 8 else module.encode_int4
        for tile in tiles:
            encode(rows[tile], self._bytes[tile])

    def values(self, first: int, stop: int) -> Tensor:
        """Rows from `first` to before `stop`, one after another."""
        packed = self._bytes[first:stop]
        found = torch.empty(len(packed), self.width, dtype=self.dtype, device=packed.device)
        module, tiles = _codec(found)
        decode = module.decode_int8 if self._bits == 8 else module.decode_int4
        for tile in tiles:
            found[tile] = decode(packed[tile], self.width, self.dtype)
        return found.view(-1)


class _View:
    """A saved tensor: where in which packed storage it lies."""

    def __init__(self, tensor: Tensor, rows: _Rows) -> None:
        self._rows, self._size, self._stride, self._offset = rows, tensor.shape, tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        """The tensor, decoded."""
        last = self._offset + sum((size - 1) * stride for size, stride in zip(self._size, self._stride, strict=True))
        first = self._offset // self._rows.width
        values = self._rows.values(first, last // self._rows.width + 1)
        return values.as_strided(self._size, self._stride, self._offset - first * self._rows.width)


class _Shelf:
    """What one call of a layer has saved.

    Args:
        tokens: of the micro-batch.
        untouched: tensors that are never packed, nor views of them.
    """

    def __init__(self, tokens: int, bits: int, width: int, untouched: list[Tensor]) -> None:
        self._tokens, self._bits, self._width = tokens, bits, width
        self._untouched = {tensor.untyped_storage().data_ptr() for tensor in untouched}
        self._known: dict[tuple[int, int, torch.dtype], tuple[StorageWeakRef, _Rows]] = {}

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """What autograd keeps in the tensor's place."""
        width = self._row(tensor)
        if width is None:
            return tensor
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor._version, tensor.dtype)
        known = self._known.get(key)
        # A freed tensor's address may have become another's.
        if known is None or known[0].expired():
            known = self._known[key] = (StorageWeakRef(storage), _Rows(tensor, width, self._bits))
        return _View(tensor, known[1])

    def _row(self, tensor: Tensor) -> int | None:
        """Values of a row of the tensor's storage; None if it is not to be packed."""
        if not tensor.is_floating_point() or tensor.numel() == 0 or type(tensor) is nn.Parameter:
            return None
        storage = tensor.untyped_storage()
        values = storage.nbytes() // tensor.itemsize
        if values % self._tokens or values // self._tokens < self._width or values * tensor.itemsize != storage.nbytes():
            return None
        if storage.data_ptr() in self._untouched or _of_parameter(tensor):
            return None
        width = values // self._tokens
        while width > MOST_WIDTH:
            if width % 2:
                return None
            width //= 2
        return width


def _of_parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter in another dtype or another view: autocast makes such copies."""
    node = tensor.grad_fn
    while node is not None and node.name() in SAME_VALUES:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def _unpack(kept: Tensor | _View) -> Tensor:
    return kept.tensor() if isinstance(kept, _View) else kept


def _codec(rows: Tensor) -> tuple[Any, list[slice]]:
    """Who packs such rows, and in which portions: a kernel all at once, plain torch a few at once."""
    if rows.is_cuda and rows.dtype is not torch.float64:
        from elite.kernels.pack import kernel

        return kernel, [slice(0, len(rows))]
    size = max(1, TILE_VALUES // rows.shape[1])
    return reference, [slice(start, start + size) for start in range(0, len(rows), size)]
