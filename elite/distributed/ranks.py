"""This process among its peers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from elite.errors import EliteError

LAST_RESORT = timedelta(days=1)
"""How long a collective waits for the others. Ranks may differ by hours in a long step, and a corpus is tokenised by one of them alone:
the watchdog, which knows the run's own step time, comes long before."""
LOST = ("gloo", "NCCL", "closed by peer", "Connection reset", "Broken pipe", "Timed out waiting", "Timeout waiting")
"""What backends say when another rank is gone or does not come."""


class RankError(EliteError):
    """Another rank is gone, or did not come to a collective."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is, on which device. A single process needs no process group."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """Sum of `value` over all ranks, in fp64."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        """Largest `value` of all ranks."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with self.meeting("all_gather"):
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`."""
        values = [value]
        if self.world > 1:
            with self.meeting("broadcast"):
                dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            with self.meeting("barrier"):
                dist.barrier()

    def _reduce(self, value: float, operation: Any) -> float:
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        with self.meeting("all_reduce"):
            dist.all_reduce(tensor, operation)
            return tensor.item()

    @contextmanager
    def meeting(self, what: str) -> Iterator[None]:
        """Within, ranks wait for each other; one that waits in vain says so.

        Raises:
            RankError: another rank is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or isinstance(error, torch.OutOfMemoryError) or not any(sign in str(error) for sign in LOST):
                raise
            said = str(error).strip().splitlines()[0]
            problem = f"rank {self.rank} of {self.world} waited in vain for another one in {what}: {said}"
            raise RankError(problem, "the same command continues from the last checkpoint") from error


def place() -> tuple[int, int, int]:
    """Local rank, rank and number of ranks, as the launcher's environment says; 0, 0, 1 alone."""
    local, rank, world = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")))
    return local, rank, world


def launched() -> bool:
    """Whether torchrun, DeepSpeed's launcher or our own started this process as one of several."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the peers named in the launcher's environment for the duration; alone, this is a plain single rank."""
    local, rank, world = place()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=LAST_RESORT)
    try:
        yield Ranks(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()
