"""One pass of a streamed model: what it is given, and the sums of gradients that it makes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from elite.chunks import Chunk, Group
from elite.data.batches import IGNORE
from elite.executor.streamed.files import raw
from elite.executor.streamed.journal import Pass
from elite.executor.streamed.rounds import Shared
from elite.executor.streamed.stem import Positions
from elite.executor.streamed.sweeps import Sweep, across_ranks, in_order


@dataclass
class Step:
    """One forward pass and what its backward needs to know."""

    ids: Tensor
    """[1, T] token ids of all rows."""
    positions: Tensor
    """[1, T]"""
    labels: Tensor
    """[T] the token each position has to predict; `IGNORE` scores none."""
    groups: tuple[Group, ...]
    trains: bool
    label_smoothing: float = 0.0
    seed: int | None = None
    """Random state is set from it before each layer and chunk, so that a recomputation draws the same masks; None draws nothing."""
    trains_embedding: bool = False
    """Whether anything before the layers is trained, once its forward pass has begun."""
    upstream: Tensor | None = None
    """Gradient of the loss, once the backward has begun."""
    shared: Shared | None = None
    """How its rows are shared, if other ranks hold parts of them; the tensors are this rank's."""
    record: Pass | None = None
    """Where its progress is kept, if it can be cut off and go on."""
    _autocast: tuple[bool, torch.dtype] = field(init=False)

    def __post_init__(self) -> None:
        kind = self.ids.device.type
        self._autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def autocast(self) -> torch.autocast:
        """Autocast as it was when the step began: the backward is asked for outside of it."""
        enabled, dtype = self._autocast
        return torch.autocast(self.ids.device.type, dtype=dtype, enabled=enabled)

    @cached_property
    def order(self) -> tuple[Chunk, ...]:
        """All chunks, first to last."""
        return in_order(self.groups)

    @cached_property
    def scored(self) -> list[bool]:
        """Whether any token of each chunk is scored. Waits for the device once a step."""
        flags = (self.labels != IGNORE).split([chunk.length for chunk in self.order])
        found: list[bool] = torch.stack([flag.any() for flag in flags]).tolist()
        return found

    def fingerprint(self) -> str:
        """Names everything that its results follow from besides the model: tokens, labels, chunks, random seed, dtype."""
        digest = hashlib.sha256(repr((self.groups, self.label_smoothing, self.seed, self._autocast)).encode())
        for tensor in (self.ids, self.positions, self.labels):
            digest.update(raw(tensor))
        return digest.hexdigest()

    def part(self, chunk: Chunk) -> Positions:
        """A chunk's tokens and positions."""
        return Positions(chunk.index, self.ids[:, chunk.start : chunk.stop], self.positions[:, chunk.start : chunk.stop])


def in_parts(step: Step, sweeps: list[Sweep]) -> list[Sweep]:
    """A step's sweeps as they are carried out: in parts where ranks share its rows."""
    return sweeps if step.shared is None else list(across_ranks(sweeps))


class GradientSum:
    """Gradients of some parameters, added up over chunks in fp32 (fp64 in fp64)."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one gradient for each parameter, None for those that had no part in it."""
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                known = self._sums[i]
                wide = torch.promote_types(gradient.dtype, torch.float32)
                self._sums[i] = gradient.to(wide) if known is None else known.add_(gradient)

    def result(self) -> list[Tensor | None]:
        """The sums, in the parameters' dtype; the next ones begin anew."""
        sums, self._sums = self._sums, [None] * len(self._sums)
        return [None if total is None else total.to(p.dtype) for total, p in zip(sums, self._parameters, strict=True)]
