"""This process among its peers."""

import os
import re
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

LAUNCHER = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
"""In the environment, from torchrun, DeepSpeed's launcher and our own."""
SLURM = ("SLURM_LOCALID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
"""The same, from srun."""
PORTS = range(20000, 32000)
"""Where ranks that srun started meet, one for a job: below those that systems hand out themselves."""


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

    def sum(self, value: float | torch.Tensor) -> float:
        """Sum of `value`, one number, over all ranks, in fp64. One that a device has yet to compute is waited for once, with the sum."""
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

    def _reduce(self, value: float | torch.Tensor, operation: Any) -> float:
        if self.world == 1:
            return float(value)
        # A tensor's copy: the sum takes its place.
        tensor = torch.as_tensor(value, dtype=torch.float64, device=self.device).clone()
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
    names = SLURM if by_slurm() else LAUNCHER
    local, rank, world = (int(os.environ.get(name, default)) for name, default in zip(names, ("0", "0", "1"), strict=True))
    return local, rank, world


def launched() -> bool:
    """Whether torchrun, DeepSpeed's launcher, srun or our own started this process as one of several."""
    return os.environ.keys() >= set(LAUNCHER) or by_slurm()


def by_slurm() -> bool:
    """Whether srun started this process as one of several, and no other launcher stands in between."""
    return not os.environ.keys() >= set(LAUNCHER) and os.environ.keys() >= set(SLURM) and int(os.environ[SLURM[-1]]) > 1


def ranks_here() -> int | None:
    """Ranks on this machine, as the launcher says; None where it says nothing."""
    if by_slurm():
        # "4(x2),3": four on each of the first two machines. Rank 0, which asks, is on the first.
        said = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return int(said[0]) if said else None
    # torchrun's name, and DeepSpeed's.
    count = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    return int(count) if count is not None else None


def _meeting() -> str:
    """Where ranks meet: what the launcher's environment says, or a port on the first of Slurm's machines."""
    if not by_slurm():
        return "env://"
    return f"tcp://{first_host(os.environ['SLURM_STEP_NODELIST'])}:{PORTS[int(os.environ['SLURM_JOB_ID']) % len(PORTS)]}"


def first_host(nodes: str) -> str:
    """The first of the machines in Slurm's short form: `gpu[003-005,7]-ib,big1` is gpu003-ib first."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,]*)", nodes)
    assert found is not None
    return "".join(part or "" for part in found.groups())


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the peers named in the launcher's environment for the duration; alone, this is a plain single rank."""
    local, rank, world = place()
    cuda = torch.cuda.is_available()
    # A scheduler may show each process its own card alone.
    device = torch.device("cuda", local % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", _meeting(), timeout=LAST_RESORT, rank=rank, world_size=world)
    try:
        yield Ranks(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()
