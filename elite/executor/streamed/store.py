"""What outlives a chunk: boundaries, gradients of boundaries, attention outputs. Which rows hold them, and in which encoding.

live       one boundary, exact: the output of the layer at work, and in the backward its gradient in the same rows
slots      boundaries kept for the backward, encoded
gradient   with a journal, one boundary more: gradients of boundaries take turns between it and live, so that the one a layer begins from
           is there until the layer is done
scratch    one boundary, exact: where layers are passed forward again between kept boundaries
outputs    a layer's attention output O and its log-sum-exp, where they are kept
keys       its keys and values besides, where they take no more than the boundary that they could be computed from
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elite.chunks import Chunk
from elite.executor.streamed.attention import Work
from elite.executor.streamed.encoding import ENCODINGS, Encoding
from elite.executor.streamed.rows import Allocator, Rows
from elite.executor.streamed.transfers import Transfers
from elite.revolve import kept_boundaries, slots_for
from elite.streaming import BoundaryEncoding, Keep, Streaming


@dataclass(frozen=True)
class Boundary:
    """Rows of hidden states [tokens, width] in an encoding."""

    rows: Rows
    encoding: Encoding
    width: int
    dtype: torch.dtype

    def write(self, transfers: Transfers, chunk: Chunk, hidden: Tensor) -> None:
        """Keep `hidden` [chunk.length, width]."""
        if self.encoding is ENCODINGS[BoundaryEncoding.exact]:
            data = hidden.contiguous().view(torch.uint8)
        else:
            data = torch.empty(len(hidden), self.rows.row_bytes, dtype=torch.uint8, device=hidden.device)
            self.encoding.encode(hidden, data)
        # One kind for all boundaries: kinds have staging buffers of their own.
        transfers.write("boundary", self.rows, chunk, data)

    def decode(self, data: Tensor) -> Tensor:
        """Hidden states [n, width] of rows [n, row_bytes] that have been read."""
        return self.encoding.decode(data, self.width, self.dtype)


class Store:
    """The rows of one model's passes, made when first needed and kept from step to step.

    Args:
        tokens: rows of each.
        width: of a hidden state.
        dtype: of exact boundaries and of their gradients.
    """

    def __init__(self, layout: Streaming, allocator: Allocator, layers: int, tokens: int, width: int, dtype: torch.dtype) -> None:
        self._layout, self._allocator, self._tokens = layout, allocator, tokens
        self._width, self._dtype, self._layers = width, dtype, layers
        self.slots = slots_for(layout.keep, layers, layout.slots)
        self.kept = kept_boundaries(layers, self.slots)
        self.live = self._boundary("live", BoundaryEncoding.exact)
        self._output_dtype, self._lse_dtype = dtype, torch.float32
        self.keeps_keys = False
        """Whether keys and values are kept with the attention outputs."""

    def slot(self, index: int) -> Boundary:
        """A kept boundary."""
        return self._boundary(f"slot{index}", self._layout.encoding)

    @property
    def scratch(self) -> Boundary:
        """See the module's docstring."""
        return self._boundary("scratch", BoundaryEncoding.exact)

    def gradient(self, layer: int) -> Boundary:
        """Where the gradient of this layer's input waits (of the last layer's output, for the number after it)."""
        return self._boundary(_gradient_rows(layer, self._layers), BoundaryEncoding.exact) if self._layout.journal else self.live

    def state(self) -> dict[str, Any]:
        """What a journal keeps of it, in plain JSON types, so that `restore` can go on with the rows in a new process."""
        names = {"dtype": self._dtype, "output_dtype": self._output_dtype, "lse_dtype": self._lse_dtype}
        return {"width": self._width} | {name: str(dtype).removeprefix("torch.") for name, dtype in names.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """See `state`; width and dtype are those it was made with."""
        self._output_dtype, self._lse_dtype = (getattr(torch, state[name]) for name in ("output_dtype", "lse_dtype"))

    def prepare(self) -> None:
        """Make everything that a training step will use but attention outputs, whose shape only the first layer tells.

        Raises:
            PlanError: the host or the disk has no room.
        """
        for index in range(self.slots):
            self.slot(index)
        if self.slots < self._layers:
            _ = self.scratch
        _ = self.gradient(self._layers)

    @property
    def segments(self) -> int:
        """Stretches of layers between kept boundaries."""
        return len(self.kept)

    def segment(self, index: int) -> range:
        """A segment's layers."""
        return range(self.kept[index], self.kept[index + 1] if index + 1 < len(self.kept) else self._layers)

    def slot_of(self, layer: int) -> Boundary | None:
        """The slot that the first sweep fills with this layer's input; None if it fills none."""
        return self.slot(self.kept.index(layer)) if layer in self.kept else None

    def sinks(self, layer: int, trains: bool) -> tuple[Boundary, ...]:
        """Where the first sweep writes this layer's input (the last layer's output, for the number after it)."""
        slot = self.slot_of(layer) if trains else None
        if slot is None:
            return (self.live,)
        return (slot,) if self._layout.encoding is BoundaryEncoding.exact else (slot, self.live)

    def source(self, layer: int, trains: bool) -> Boundary:
        """Where the first sweep reads this layer's input: the exact one of its sinks."""
        return self.sinks(layer, trains)[-1]

    @property
    def keeps_outputs(self) -> bool:
        """Whether attention outputs are kept."""
        return self._layout.keep is Keep.attention

    def keep_attention(self, transfers: Transfers, layer: int, chunk: Chunk, work: Work) -> None:
        """Keep what a layer's attention has made of a chunk."""
        assert work.made is not None
        o, lse = work.made
        self._output_dtype, self._lse_dtype = o.dtype, lse.dtype
        data = {"o": o.flatten(1), "lse": lse.t()}
        # None across ranks, which compute queries again, and keys and values with them.
        if work.keys is not None and self._layout.keeps_keys(_row_bytes(work.keys), self.live.rows.row_bytes):
            data |= {"k": work.keys[0].flatten(1), "v": work.keys[1].flatten(1)}
            self.keeps_keys = True
        for kind, values in data.items():
            raw = values.contiguous().view(torch.uint8)
            if layer == 0 and chunk.index == 0:
                # All layers' at once: what does not fit is known before the step has done anything.
                for each in range(self._layers):
                    self._allocator.rows(f"{kind}{each}", self._layout.boundaries, self._tokens, raw.shape[1])
            rows = self._allocator.rows(f"{kind}{layer}", self._layout.boundaries, self._tokens, raw.shape[1])
            transfers.write(kind, rows, chunk, raw)

    def outputs(self, layer: int) -> dict[str, Rows]:
        """Rows of O and its log-sum-exp, as `Transfers.read` takes them."""
        return {kind: self._allocator.known(f"{kind}{layer}") for kind in ("o", "lse")}

    def keys(self, layer: int) -> dict[str, Rows]:
        """Rows of keys and values."""
        return {kind: self._allocator.known(f"{kind}{layer}") for kind in ("k", "v")}

    def output_of(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """O [n, H, D] and its log-sum-exp [H, n] of rows that have been read."""
        lse = data["lse"].view(self._lse_dtype)
        return data["o"].view(self._output_dtype).unflatten(1, (lse.shape[1], -1)), lse.t().contiguous()

    def _boundary(self, name: str, encoding: BoundaryEncoding) -> Boundary:
        how = ENCODINGS[encoding]
        rows = self._allocator.rows(name, self._layout.boundaries, self._tokens, how.row_bytes(self._width, self._dtype))
        return Boundary(rows, how, self._width, self._dtype)


def _row_bytes(tensors: tuple[Tensor, Tensor]) -> int:
    """A token's bytes in both."""
    return sum(t[0].numel() * t.element_size() for t in tensors)


def _gradient_rows(layer: int, layers: int) -> str:
    # The head reads live, the last layer's output.
    return "live" if (layers - layer) % 2 else "gradient"


def rows_needed(layers: int, forward: int, descended: int | None, outputs: bool) -> list[str]:
    """Names of the rows that the rest of a pass reads, where every boundary is kept.

    Args:
        forward: layers that the first sweep has done.
        descended: the lowest layer whose backward is done, `layers` if only the head's is; None before.
        outputs: whether attention outputs are kept.
    """
    behind = forward if descended is None else descended
    inputs = [f"slot{layer}" for layer in range(min(behind + (descended is None), layers))]
    kept = [f"{kind}{layer}" for layer in range(behind) for kind in ("o", "lse")] if outputs else []
    if descended is not None:
        return [*inputs, *kept, _gradient_rows(descended, layers)]
    return [*inputs, *kept, *(["live"] if forward == layers else [])]
