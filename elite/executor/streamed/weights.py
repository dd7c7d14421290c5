"""Where the weights wait: on the device, or frozen ones of the decoder layers in pinned host memory, copied one layer ahead.

Streamed weights change place only through `Parameter.data`, so the model keeps its modules, names and state dict. What is trained
stays on the device: its gradients and optimizer state are there. Weights that ranks divide: divided.py.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elite import hardware
from elite.errors import ModelError, PlanError
from elite.executor.streamed.rows import HOST_RESERVE_BYTES, give_back, pinned
from elite.facts import GIB

HOST = 2
"""Where a layer's weights wait; 0 and 1 are the device's buffers."""
ALIGNMENT = 256
"""Bytes at which each weight begins, as the device's allocator aligns them."""


class Weights:
    """All weights are on the device already."""

    host_bytes = 0
    """Pinned host memory."""

    def before_layers(self) -> AbstractContextManager[Any]:
        """Within, the embedding is at hand, and whatever else stands before the layers."""
        return nullcontext()

    def after_layers(self) -> AbstractContextManager[Any]:
        """Within, final norm and head are at hand."""
        return nullcontext()

    def use(self, layer: int, following: int | None) -> AbstractContextManager[Any]:
        """Within, this layer's weights are on the device; those of the following one are on their way."""
        return nullcontext()

    def on_demand(self) -> AbstractContextManager[Any]:
        """Within, layers may be called in any order."""
        return nullcontext()

    def inputs(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """What autograd sees of these, which are trained."""
        return list(parameters)

    def take(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], later: Collection[nn.Parameter] = ()
    ) -> list[Tensor | None]:
        """Gradients of a pass, while their parameters are at hand; returns what autograd hands on, one for each of `inputs`.

        Args:
            later: more is to come for these in the same pass.
        """
        return list(gradients)

    def refresh(self) -> None:
        """Nothing is cached."""

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether it waits elsewhere, and comes when it is needed."""
        return False

    def undo(self) -> None:
        """Nothing was moved."""


@dataclass(frozen=True)
class _Piece:
    """One weight's bytes within its layer's buffer."""

    parameter: nn.Parameter
    original: Tensor
    """Empty, but with the dtype and device it had."""
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def within(self, buffer: Tensor) -> Tensor:
        """The weight as a view of a layer's buffer [bytes]."""
        size = self.shape.numel() * self.dtype.itemsize
        return buffer[self.offset : self.offset + size].view(self.dtype).view(self.shape)


class StreamedWeights(Weights):
    """Frozen weights in pinned host memory, and two buffers on the device that take layers in turn.

    Args:
        layers: decoder layers; their frozen parameters move to host memory at once.
        device: where the model computes.

    Raises:
        PlanError: the host has no room for them.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self._layers, self._device, self._cuda = layers, device, device.type == "cuda"
        plans = [_pieces(layer) for layer in layers]
        self._pieces = [pieces for pieces, _ in plans]
        self._held = {id(piece.parameter) for pieces in self._pieces for piece in pieces}
        total, free = sum(size for _, size in plans), hardware.host_memory()[1] - HOST_RESERVE_BYTES
        if total > free:
            raise PlanError(
                f"streamed weights take {total / GIB:.1f} GiB of host memory, {max(0, free) / GIB:.1f} GiB are free",
                "optimizations.qlora.enabled=true or executor.weights=resident",
            )
        self.host_bytes = total
        self._host = [self._moved(pieces, size) for pieces, size in plans]
        most = max(size for _, size in plans)
        self._buffers = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(2)]
        # Made once: layers come and go many times in a step.
        self._views = [
            [_views(pieces, place) for place in (*self._buffers, host)] for pieces, host in zip(self._pieces, self._host, strict=True)
        ]
        self._holds: list[int | None] = [None, None]
        self._arrived: list[Any] = [None, None]
        # The computation may still have to come to who had this memory before.
        self._free: list[Any] = [torch.cuda.current_stream(device).record_event() if self._cuda else None for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if self._cuda else None

    @contextmanager
    def use(self, layer: int, following: int | None) -> Iterator[None]:
        """Within, this layer's weights are on the device; those of the following one are on their way."""
        slot = self._bring(layer, other_than=None)
        if following is not None and following != layer:
            self._bring(following, other_than=slot)
        if self._cuda:
            torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])
        self._point(layer, slot)
        try:
            yield
        finally:
            self._point(layer, HOST)
            if self._cuda:
                self._free[slot] = torch.cuda.current_stream(self._device).record_event()

    @contextmanager
    def on_demand(self) -> Iterator[None]:
        """Within, layers may be called in any order: each brings its weights when it is called (generation)."""
        with ExitStack() as stack, ExitStack() as at_work:
            for index, layer in enumerate(self._layers):

                def bring(_layer: nn.Module, _inputs: Any, index: int = index) -> None:
                    at_work.enter_context(self.use(index, None))

                for handle in (layer.register_forward_pre_hook(bring), layer.register_forward_hook(lambda *_: at_work.close())):
                    stack.callback(handle.remove)
            yield

    def refresh(self) -> None:
        """Take over what others have written to the weights since the last step: a loaded checkpoint, a merged adapter."""
        self._holds = [None, None]
        for pieces, views in zip(self._pieces, self._views, strict=True):
            for piece, here in zip(pieces, views[HOST], strict=True):
                if piece.parameter.requires_grad:
                    raise ModelError("a weight that is streamed has become trainable", "undo the attachment and attach again")
                if piece.parameter.data_ptr() != here.data_ptr():
                    here.copy_(piece.parameter.data)
                    piece.parameter.data = here

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether it waits in host memory."""
        return id(parameter) in self._held

    def undo(self) -> None:
        """Put every weight back where it was."""
        for pieces, host in zip(self._pieces, self._host, strict=True):
            for piece in pieces:
                piece.parameter.data = piece.within(host).to(piece.original.device, copy=True)

    def _moved(self, pieces: list[_Piece], size: int) -> Tensor:
        host = pinned(1, size, self._device)[0]
        for piece in pieces:
            view = piece.within(host)
            view.copy_(piece.parameter.data)
            piece.parameter.data = view
        # Before the next layer's: else all would be in host memory twice.
        give_back()
        return host

    def _bring(self, layer: int, other_than: int | None) -> int:
        """Begin to copy a layer's weights unless they are there; returns the buffer's number."""
        if layer in self._holds:
            return self._holds.index(layer)
        slot = 1 - other_than if other_than is not None else 0
        host = self._host[layer]
        if self._cuda:
            assert self._stream is not None
            self._stream.wait_event(self._free[slot])
            with torch.cuda.stream(self._stream):
                self._buffers[slot][: len(host)].copy_(host, non_blocking=True)
                self._arrived[slot] = self._stream.record_event()
        else:
            self._buffers[slot][: len(host)].copy_(host)
        self._holds[slot] = layer
        return slot

    def _point(self, layer: int, place: int) -> None:
        # A packed weight's own class would look at every assignment.
        with torch._C.DisableTorchFunctionSubclass():
            for piece, view in zip(self._pieces[layer], self._views[layer][place], strict=True):
                piece.parameter.data = view


def _views(pieces: list[_Piece], place: Tensor) -> list[Tensor]:
    """A layer's weights in a buffer."""
    return [piece.within(place) for piece in pieces]


def _pieces(layer: nn.Module) -> tuple[list[_Piece], int]:
    """A layer's frozen parameters and the bytes that they take together."""
    pieces, offset = [], 0
    for parameter in layer.parameters():
        if not parameter.requires_grad:
            data = parameter.data
            pieces.append(_Piece(parameter, data.new_empty(0), offset, data.shape, data.dtype))
            offset += -(-data.nbytes // ALIGNMENT) * ALIGNMENT
    return pieces, offset
