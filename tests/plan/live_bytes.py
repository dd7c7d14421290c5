"""What autograd saves, and what a computation really holds (`LiveBytes`)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from elite.training.live_bytes import LiveBytes

__all__ = ["LiveBytes", "SavedBytes"]


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
