"""How a streamed pass is laid out: what is kept for the backward, where, in which encoding. Plain values, no torch.

A *chunk* is the query tokens handled at once, a *block* the keys of one attention-backward call, a *boundary* the hidden states
[tokens, hidden] at a layer's input.
"""

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from elite.errors import PlanError


class Keep(Enum):
    """What the forward pass leaves for the backward, most memory and least recomputation first."""

    attention = "attention"
    """Every boundary, and every layer's attention output with its log-sum-exp: no attention is computed twice."""
    layers = "layers"
    """Every boundary."""
    sqrt = "sqrt"
    """About 2√L boundaries: in all, layers are passed forward less than twice before their own backward."""
    multilevel = "multilevel"
    """As few boundaries as `slots` says, by binomial checkpointing (Griewank and Walther 2000)."""


class Place(Enum):
    """Where rows wait."""

    device = "device"
    host = "host"
    """Pinned host memory."""
    disk = "disk"
    """A memory-mapped file."""


class BoundaryEncoding(Enum):
    """How a kept boundary is stored. The forward pass itself always goes on with exact values."""

    exact = "exact"
    int8 = "int8"
    int4 = "int4"


VALUE_BITS = {BoundaryEncoding.int8: 8.5, BoundaryEncoding.int4: 4.5}
"""Bits a value of the lossy encodings, everything included, at most."""


class WeightPlace(Enum):
    """Where frozen weights of the decoder layers wait."""

    resident = "resident"
    """On the device."""
    streamed = "streamed"
    """In pinned host memory; a layer's weights are copied while the layer before it works."""


ARGUMENT_BYTES = 256 * 1024**2
"""Layer arguments (rotary embeddings) of chunks are kept on the device up to this size, and made anew beyond."""


@dataclass(frozen=True)
class Streaming:
    """One layout, every choice made."""

    chunk: int = 8192
    """Most query tokens at once."""
    block: int = 65536
    """Most keys in one attention-backward call: library kernels expand K/V gradients to all query heads."""
    keep: Keep = Keep.layers
    slots: int = 4
    """Boundaries at once under `multilevel`."""
    boundaries: Place = Place.host
    encoding: BoundaryEncoding = BoundaryEncoding.exact
    keys_values: Place = Place.device
    """Keys, values and their gradients of the layer at work: `device` or `host`."""
    weights: WeightPlace = WeightPlace.resident
    folder: str | None = None
    """Where boundaries on disk are kept; needed for `boundaries=disk` alone."""
    journal: bool = False
    """Whether a training step can be cut off and go on layer by layer (elite/executor/streamed/journal.py)."""

    def keeps_keys(self, row_bytes: float, boundary_bytes: float) -> bool:
        """Whether keys and values are kept with the attention outputs: where they take no more than what they could be computed from.

        Args:
            row_bytes: a token's keys and values.
            boundary_bytes: a token's exact boundary.
        """
        near = self.boundaries is not Place.disk and self.keys_values is Place.device
        return self.keep is Keep.attention and near and row_bytes <= boundary_bytes

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {f.name: value.value if isinstance(value := getattr(self, f.name), Enum) else value for f in fields(self)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Streaming":
        """What `to_dict` made plain."""
        kinds: dict[str, Any] = {
            "keep": Keep,
            "boundaries": Place,
            "encoding": BoundaryEncoding,
            "keys_values": Place,
            "weights": WeightPlace,
        }
        return cls(**{name: kinds[name](value) if name in kinds else value for name, value in plain.items()})


def check_layout(layout: Streaming) -> None:
    """Refuse layouts that contradict themselves.

    Raises:
        PlanError: this is one.
    """
    if layout.keep is Keep.attention and layout.encoding is not BoundaryEncoding.exact:
        raise PlanError(
            f"executor.keep=attention with executor.encoding={layout.encoding.value}: kept outputs belong to exact boundaries",
            "executor.encoding=exact or executor.keep=layers",
        )
    if layout.keys_values is Place.disk:
        raise PlanError("executor.keys_values=disk: keys and values are read for every chunk", "executor.keys_values=host")
    if layout.journal:
        check_journal(layout.boundaries, layout.keep, layout.encoding)
    for name, value in (("chunk", layout.chunk), ("block", layout.block), ("slots", layout.slots)):
        if value < 1:
            raise PlanError(f"executor.{name}={value}: must be positive", f"leave executor.{name} out")


JOURNALED = (Keep.attention, Keep.layers)
"""What may be kept where progress within a step is: every layer finds its own input, whatever was cut off."""


def check_journal(boundaries: Place | None, keep: Keep | None, encoding: BoundaryEncoding) -> None:
    """Refuse layouts whose progress within a step cannot be kept; what is None is still open.

    Raises:
        PlanError: this is one.
    """
    switch = "training.mid_step_checkpoint=true"
    if boundaries is not Place.disk:
        raise PlanError(f"{switch}: what a step has done must lie in files", "executor.boundaries=disk")
    if keep is not None and keep not in JOURNALED:
        raise PlanError(
            f"{switch} with executor.keep={keep.value}: layers without a boundary of their own would be lost with the one at work",
            "executor.keep=layers or executor.keep=attention",
        )
    if encoding is not BoundaryEncoding.exact:
        raise PlanError(
            f"{switch} with executor.encoding={encoding.value}: the exact boundary it goes on from is overwritten layer by layer",
            "executor.encoding=exact",
        )
