"""Memory of tensors where no allocator counts it: on a CPU."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations create while active; `peak` is the most alive at once.

    Args:
        limit: more than so many bytes at once are refused as a device would refuse them; unset: nothing is.
    """

    def __init__(self, limit: float | None = None) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._limit = limit
        self._known: set[int] = set()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Storages that existed before."""
        for tensor in tensors:
            self._count(tensor, 0)

    def _count(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.current += size
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What is read but was made by no operation here existed before.
        self.ignore(tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.current)
        if self._limit is not None and self.current > self._limit:
            raise torch.OutOfMemoryError(f"{self.current:,} bytes of tensors at once, more than the {self._limit:,.0f} allowed")
        return out
