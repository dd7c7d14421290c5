"""Exchange of gradients as low-rank factors, by torch's PowerSGD hook, kept by parameter.

torch keeps what it remembers by DDP's buckets, and those are laid out anew after a process's first exchange: a process that continues
begins with others than it left. Here everything is kept by parameter and laid out for the buckets as they come; factors are drawn from
the run's seed, the parameter and the exchange. So neither the layout nor a new process changes what is exchanged.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from elite.optimizations.hooks import Hook

LEAST_NORM = 1e-20
"""Added to a column's norm, so that the factors of a gradient that is zero, as an adapter's first is, are zero and not 0/0."""


class _Matrix(NamedTuple):
    """A parameter whose gradient is compressed."""

    place: int
    """Among those that are trained."""
    rows: int
    columns: int
    rank: int


class LowRankExchange(Hook):
    """Exchanges gradients in DDP's backward; between steps it counts bytes and keeps what a checkpoint needs.

    Args:
        model: whose gradients are exchanged; it takes one such hook for good.
        rank: of the factors.
        start: exchanges before the first compressed one.
        error_feedback: what the factors leave out is added to the next gradient.
        warm_start: begin with the last exchange's factors.
        least: so many times smaller a matrix must become.
        seed: of the factors that are drawn; the same on all ranks.
    """

    def __init__(
        self,
        name: str,
        model: DistributedDataParallel,
        rank: int,
        start: int,
        error_feedback: bool,
        warm_start: bool,
        least: int,
        seed: int,
    ) -> None:
        self.name = name
        self._rank, self._start, self._feedback, self._warm, self._least, self._seed = rank, start, error_feedback, warm_start, least, seed
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._places = {id(parameter): place for place, parameter in enumerate(self._parameters)}
        self._group = model.process_group
        # With torch's own cold start one bucket's end would clear what another still needs: factors are drawn here.
        self._state = PowerSGDState(
            self._group,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=start,
            min_compression_rate=least,
            use_error_feedback=error_feedback,
            warm_start=True,
            orthogonalization_epsilon=LEAST_NORM,
        )
        self._layouts: dict[int, tuple[int, ...]] = {}
        """Places of the parameters in each bucket that torch keeps something of."""
        self._errors: dict[int, Tensor] = {}
        self._factors: dict[int, Tensor] = {}
        """What waits for a bucket, by place: what was left out, and Q."""
        self._whole, self._sent, self._forgotten = 0, 0, 0
        self._read = (0, 0)
        self._ended = False
        model.register_comm_hook(None, self._exchange)

    @property
    def compressed(self) -> int:
        """Matrices that are sent as factors."""
        return len(self._matrices(range(len(self._parameters))))

    def end(self) -> None:
        """Exchange gradients whole from here on."""
        self._ended = True

    def words(self) -> str:
        """Bytes that this rank has handed over, and what they would have been."""
        return f"{self._sent:,} bytes handed over instead of {self._whole:,}, {self._whole / max(1, self._sent):.2f} times fewer"

    def gradients(self, parameters: Sequence[Any], step: int) -> None:
        if not self._layouts:
            return
        norms = [torch.linalg.vector_norm(parameter.grad) for parameter in parameters if parameter.grad is not None]
        # All ranks have the same gradients now, and so the same answer.
        if not bool(torch.stack(norms).isfinite().all()):
            self._forget()
            self._forgotten += 1

    def metrics(self) -> dict[str, float]:
        whole, sent = self._whole - self._read[0], self._sent - self._read[1]
        self._read = (self._whole, self._sent)
        return {"exchanged_bytes": sent, "exchange_compression": whole / max(1, sent)}

    def counts(self) -> dict[str, float]:
        found = {"exchanges": self._state.iter, "exchanged_bytes": self._sent, "compression": self._whole / max(1, self._sent)}
        return found | ({"forgotten": self._forgotten} if self._forgotten else {})

    def state(self) -> dict[str, Any]:
        self._dissolve(0)
        return {
            "iteration": self._state.iter,
            "bytes": [self._whole, self._sent, self._forgotten],
            "errors": self._gathered() if self._errors else [],
            # Equal on all ranks.
            "factors": dict(self._factors),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._forget()
        self._state.iter = state["iteration"]
        self._whole, self._sent, self._forgotten = state["bytes"]
        self._read = (self._whole, self._sent)
        self._factors = dict(state["factors"])
        errors: list[Tensor] = state["errors"]
        if errors:
            # Gradients are averaged: with another number of ranks each takes the mean of what was left out, which adds the same to it.
            same = len(errors) == self._group.size()
            own = errors[self._group.rank()] if same else torch.stack(errors).mean(0)
            sizes = [parameter.numel() for parameter in self._parameters]
            self._errors = dict(enumerate(own.split(sizes)))

    def _exchange(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """DDP calls it for each bucket, in their order, on all ranks."""
        if self._ended:
            return allreduce_hook(self._group, bucket)
        whole = bucket.buffer().nbytes
        self._whole += whole
        if self._state.iter < self._start:
            self._sent += whole
            return powerSGD_hook(self._state, bucket)
        self._lay_out(bucket)
        before = self._state.total_numel_after_compression
        future = powerSGD_hook(self._state, bucket)
        self._sent += (self._state.total_numel_after_compression - before) * bucket.buffer().element_size()
        if bucket.buffer().device.type == "cpu":
            # torch's hook exchanges the factors from callbacks. gloo runs those in two threads of its own, which would wait for each other
            # where several buckets are at work, and in another order on every rank; a GPU's run here, in order.
            future.wait()
        return future

    def _lay_out(self, bucket: dist.GradBucket) -> None:
        """Give torch what belongs to the bucket's parameters, in its order."""
        index, places = bucket.index(), tuple(self._places[id(parameter)] for parameter in bucket.parameters())
        known = self._layouts.get(index)
        if known == places and self._warm:
            return
        if known is not None and known != places:
            # Those before it, at work by now, have kept their places.
            self._dissolve(index)
        buffer, matrices = bucket.buffer(), self._matrices(places)
        if known != places:
            self._layouts[index] = places
            self._state.p_memory_dict[index] = buffer.new_empty(sum(one.rows * one.rank for one in matrices))
            if self._feedback:
                left = [self._errors.pop(place, None) for place in places]
                parts = [
                    buffer.new_zeros(self._parameters[place].numel()) if one is None else one
                    for place, one in zip(places, left, strict=True)
                ]
                self._state.error_dict[index] = torch.cat([part.to(buffer) for part in parts])
        known_factors = [self._factors.pop(one.place, None) for one in matrices]
        factors = [self._drawn(one) if found is None else found for one, found in zip(matrices, known_factors, strict=True)]
        self._state.q_memory_dict[index] = torch.cat([factor.to(buffer) for factor in factors]) if factors else buffer.new_empty(0)

    def _matrices(self, places: Sequence[int]) -> list[_Matrix]:
        """What is compressed of these parameters, in torch's order: by shape, in order of the shapes' first appearance."""
        shapes: dict[tuple[int, int], list[_Matrix]] = {}
        for place in places:
            parameter = self._parameters[place]
            rows = parameter.shape[0]
            columns = parameter.numel() // rows
            rank = min(rows, columns, self._rank)
            if (rows + columns) * rank * self._least < rows * columns:
                shapes.setdefault((rows, columns), []).append(_Matrix(place, rows, columns, rank))
        return [one for same in shapes.values() for one in same]

    def _drawn(self, matrix: _Matrix) -> Tensor:
        """A Q to begin with; torch makes its columns orthonormal."""
        seed = np.random.SeedSequence((self._seed, self._state.iter, matrix.place)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(seed[0] >> 1))
        return torch.randn(matrix.columns * matrix.rank, generator=generator)

    def _dissolve(self, first: int) -> None:
        """Take back, by parameter, what torch keeps of this bucket and of those after it."""
        for index in [index for index in self._layouts if index >= first]:
            places = self._layouts.pop(index)
            self._state.p_memory_dict.pop(index)
            matrices = self._matrices(places)
            parts = self._state.q_memory_dict.pop(index).split([one.columns * one.rank for one in matrices]) if matrices else ()
            if self._warm:
                self._factors |= {one.place: part for one, part in zip(matrices, parts, strict=True)}
            if self._feedback:
                sizes = [self._parameters[place].numel() for place in places]
                self._errors |= dict(zip(places, self._state.error_dict.pop(index).split(sizes), strict=True))

    def _forget(self) -> None:
        self._dissolve(0)
        self._errors.clear()
        self._factors.clear()

    def _gathered(self) -> list[Tensor]:
        """What each rank has left out, by rank, all parameters in one row in host memory; on the others than rank 0 nothing."""
        main, rows = self._group.rank() == 0, [list[Tensor]() for _ in range(self._group.size())]
        for place in range(len(self._parameters)):
            # One at a time: the device has no room for everybody's.
            own = self._errors[place].to(self._parameters[place].device).contiguous()
            found = [torch.empty_like(own) for _ in rows] if main else None
            dist.gather(own, found, group=self._group, group_dst=0)
            for row, part in zip(rows, found or (), strict=False):
                row.append(part.cpu())
        return [torch.cat(row) for row in rows] if main else []
