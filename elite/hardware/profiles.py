"""What `mode=profile` measured, kept as one JSON file a machine in the cache folder.

A file belongs to one device, its memory, driver and torch version: a new driver is a new machine. Whatever is not such a file, whole and of
this machine, is ignored aloud.
"""

import hashlib
import json
import logging
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from elite.facts import AttentionRates, Rates
from elite.hardware.detect import DISK_READ_BYTES_PER_S, DISK_WRITE_BYTES_PER_S, Gpu, cores, cpu_name, host_memory

log = logging.getLogger("elite.hardware")

FORMAT = 1
OF_RUNS = 1.1
"""Host time of an operation of a run over that of the stress test's, one small model's over and over (host_paths.json: its steps, and the
stress test's beside them)."""
IN_RUNS = 0.96
"""Rates of matrix products and attention in a run over the stress test's, which does one of a size over and over (calibration_fifth.json
and calibration_profile.json: steps that do not wait for the host)."""
FOLDER = "hardware"
"""In the cache folder."""


@dataclass(frozen=True)
class Machine:
    """What a profile is of."""

    device: str
    memory_bytes: int
    driver: str
    """Empty for a CPU."""
    torch: str
    cores: int

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]}.json"


@dataclass(frozen=True)
class AttentionProfile:
    """One kernel at one head dimension; FLOP/s, a pair of query and key counted 4·D forward and 10·D backward a head."""

    kernel: str
    head_dim: int
    square_tokens: int
    """Queries and keys of the causal square."""
    square_forward: float
    square_backward: float
    long_forward: float
    """A chunk of queries on more keys, unmasked."""
    long_backward: float

    def rates(self) -> AttentionRates:
        """As the time model has them."""
        pairs = ((self.long_forward, self.square_forward), (self.long_backward, self.square_backward))
        halves = [max(0.0, self.square_tokens * (long / square - 1)) for long, square in pairs]
        return AttentionRates(max(self.long_forward, self.square_forward), max(self.long_backward, self.square_backward), *halves)

    @property
    def pair_s(self) -> float:
        """Time of a pair on long rows, forward and backward, up to a factor that kernels share."""
        return 4 / self.long_forward + 10 / self.long_backward


@dataclass(frozen=True)
class Profile:
    """Figures of the stress test, per second unless their names say otherwise."""

    machine: Machine
    measured_at: str
    compute_dtype: str
    largest_allocation_bytes: float
    """On a GPU the largest tensor that could be made and written; on a CPU the memory available."""
    matmul_flops: float
    """Sustained, in the compute dtype."""
    fp32_flops: float
    copy_bytes: float
    """Read and written, on the device."""
    to_device_bytes: float
    to_host_bytes: float
    """From and to pinned memory, one at a time."""
    both_to_device_bytes: float
    both_to_host_bytes: float
    """The same, both at once."""
    attention: tuple[AttentionProfile, ...]
    launch_s: float
    """Host time of one small kernel."""
    operation_s: float
    """Host time of one eager operation of a real model, forward and backward."""
    disk_write_bytes: float
    disk_read_bytes: float
    """0 where the cache folder had no room for the test."""
    left_out: dict[str, str]
    """Attention kernels that do not run here, and why."""


def least(gpus: list[Gpu]) -> Gpu:
    """The card that decides: all ranks do the same, so the one with least memory."""
    return min(gpus, key=lambda gpu: min(gpu.free_bytes, gpu.total_bytes))


def machine_of(gpu: Gpu | None) -> Machine:
    """What identifies a profile of this GPU, or of this machine's CPU."""
    torch = metadata.version("torch")
    if gpu is None:
        return Machine(cpu_name(), host_memory()[0], "", torch, cores())
    return Machine(gpu.name, gpu.total_bytes, gpu.driver, torch, cores())


def path_of(machine: Machine, cache: Path) -> Path:
    """Where its profile lies."""
    return cache / FOLDER / machine.file


def write(profile: Profile, cache: Path) -> Path:
    """Keep a profile, in one move, so that a reader never sees half a file; returns where."""
    path = path_of(profile.machine, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"format": FORMAT, **asdict(profile)}, indent=1) + "\n")
    part.replace(path)
    return path


def read(machine: Machine, cache: Path) -> Profile | None:
    """The profile of this machine, if there is a good one; says why not where there is a file."""
    path = path_of(machine, cache)
    if not path.exists():
        return None
    try:
        profile = _profile(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s is no profile of a machine (%s): ignored; mode=profile measures anew", path, error)
        return None
    if profile.machine != machine:
        log.warning("%s is a profile of another machine (%s): ignored; mode=profile measures anew", path, profile.machine.device)
        return None
    return profile


def _profile(plain: dict[str, Any]) -> Profile:
    if plain.pop("format") != FORMAT:
        raise ValueError("its format is another version's")
    machine, attention = Machine(**plain.pop("machine")), tuple(AttentionProfile(**line) for line in plain.pop("attention"))
    profile = Profile(machine=machine, attention=attention, **plain)
    may_be_zero = ("disk_write_bytes", "disk_read_bytes")
    parts: list[Profile | AttentionProfile] = [profile, *attention]
    for made in parts:
        for field in fields(made):
            value = getattr(made, field.name)
            if field.type in (float, "float") and not (
                isinstance(value, int | float) and math.isfinite(value) and (value > 0 or field.name in may_be_zero)
            ):
                raise ValueError(f"{field.name} is {value!r}")
    if not attention:
        raise ValueError("no attention kernel was measured")
    return profile


def in_runs(operation_s: float, *, on_gpu: bool) -> float:
    """An operation's host time in a run, from the stress test's. A CPU's operations hold the computation."""
    return (OF_RUNS if on_gpu else 1.0) * operation_s


def measured_rates(profile: Profile, allowed: tuple[str, ...] | None) -> Rates:
    """A profile as the time model reads it.

    Args:
        allowed: attention kernels that may be used; None for all that were measured.
    """
    usable = [line for line in profile.attention if allowed is None or line.kernel in allowed] or list(profile.attention)
    fastest: dict[int, AttentionProfile] = {}
    for line in usable:
        known = fastest.get(line.head_dim)
        if known is None or line.pair_s < known.pair_s:
            fastest[line.head_dim] = line
    on_gpu = bool(profile.machine.driver)
    share = IN_RUNS if on_gpu else 1.0
    attention = {dim: line.rates() for dim, line in fastest.items()}
    return Rates(
        matmul_flops_per_s=share * profile.matmul_flops,
        fp32_flops_per_s=share * profile.fp32_flops,
        attention={dim: replace(it, forward=share * it.forward, backward=share * it.backward) for dim, it in attention.items()},
        memory_bytes_per_s=profile.copy_bytes,
        to_device_bytes_per_s=profile.both_to_device_bytes,
        to_host_bytes_per_s=profile.both_to_host_bytes,
        disk_read_bytes_per_s=profile.disk_read_bytes or DISK_READ_BYTES_PER_S,
        disk_write_bytes_per_s=profile.disk_write_bytes or DISK_WRITE_BYTES_PER_S,
        operation_s=in_runs(profile.operation_s, on_gpu=on_gpu),
        origin=f"this machine, measured on {profile.measured_at[:10]}",
    )
