"""What a computation really holds: bytes of live tensor storages, their peak, and what autograd saves."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations create while active; `peak` is the most alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Storages that existed before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.current += size
                    weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.current)
        return out


class SavedBytes:
    """Sums the distinct storages that autograd saves while `hooks` is active, `exempt` (parameters, buffers) aside."""

    def __init__(self, exempt: Iterable[Tensor]) -> None:
        self._exempt = {tensor.untyped_storage().data_ptr() for tensor in exempt}
        self._seen: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self._exempt:
            # Kept, so that no later tensor takes its address.
            self._seen[pointer] = tensor
        return tensor

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._seen.values())
