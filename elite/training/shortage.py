"""Running out of memory: what it looks like, what was planned and what was there, what would help."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch
from rich.table import Table

from elite.config import RunConfig
from elite.errors import EliteError
from elite.facts import GIB, Device, ModelShape
from elite.plan.fix import smallest_change
from elite.plan.words import gib

SIGNS = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""Libraries say it in their own words, in a plain RuntimeError."""
UNMADE = "could not create a primitive"
"""All that oneDNN says where the system refuses it memory; what it does not know at all it names further."""
REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")
UNITS = {"bytes": 1, "KiB": 1024, "MiB": 1024**2, "GiB": GIB}
RESIDENT = ("linear_weights", "other_weights", "trainable_copy")
"""Components of a plan that are the model itself."""
NO_LESS = 0.05
"""Share by which memory is taken to be short at least: a request that failed may have been a small one."""


class MemoryShortage(EliteError):
    """There is less memory than the run takes."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a device or of the host, ran out."""
    said = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or said == UNMADE or any(sign in said for sign in SIGNS)


@dataclass(frozen=True)
class Actual:
    """What a process held when memory ran out, in bytes. On a CPU allocated is the whole process and reserved 0."""

    weights: float
    gradients: float
    optimizer_state: float
    allocated: float
    """Highest since the last step."""
    reserved: float
    requested: float
    """What could not be had; 0 if the library did not say."""
    device_free: float
    """On the whole device, or in the host."""


def actual(message: str, model: Any, optimizer: torch.optim.Optimizer | None, device: torch.device) -> Actual:
    """Look at the process. Model and optimizer may not exist yet.

    Args:
        message: of the error, which may say what was refused.
    """
    parameters = list(model.parameters()) if model is not None else []
    state = [value for one in optimizer.state.values() for value in one.values()] if optimizer is not None else []
    cuda = device.type == "cuda"
    return Actual(
        weights=_bytes(parameters, device),
        gradients=_bytes((p.grad for p in parameters if p.grad is not None), device),
        optimizer_state=_bytes(state, device),
        allocated=torch.cuda.max_memory_allocated(device) if cuda else psutil.Process().memory_info().rss,
        reserved=torch.cuda.max_memory_reserved(device) if cuda else 0,
        requested=requested_bytes(message),
        device_free=torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available,
    )


def _bytes(values: Iterable[Any], device: torch.device) -> float:
    return sum(value.untyped_storage().nbytes() for value in values if isinstance(value, torch.Tensor) and value.device.type == device.type)


def requested_bytes(message: str) -> float:
    """The allocation that an allocator's message says has failed; 0 if it does not say."""
    found = REQUEST.search(message)
    return float(found[1]) * UNITS[found[2]] if found else 0.0


def smaller(config: RunConfig, device: Device, shape: ModelShape, planned_bytes: float, have_bytes: float, need_bytes: float) -> str:
    """The smallest change of the run with which it should go: its plan must fall by as much as was missing.

    Args:
        config: with a number as micro-batch.
        have_bytes: what the process had when it was refused more.
        need_bytes: that and what it was refused.
    """
    share = min(have_bytes / need_bytes, 1 - NO_LESS) if need_bytes else 1 - NO_LESS
    usable = min(planned_bytes, device.memory_usable_bytes * (1 - config.plan.headroom_fraction)) * share
    tight = replace(device, memory_usable_bytes=max(1, int(usable / (1 - config.plan.headroom_fraction))))
    return smallest_change(config, tight, shape)


def breakdown(planned: dict[str, float], usable_bytes: float, found: Actual) -> Table:
    """Planned against actual, by component.

    Args:
        planned: bytes by component (`Plan.memory`).
    """
    table = Table(title="Memory, planned and actual", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name, justify in (("component", "left"), ("planned", "right"), ("actual", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    known = {"gradients": found.gradients, "optimizer_state": found.optimizer_state}
    table.add_row("weights", gib(sum(planned[name] for name in RESIDENT)), gib(found.weights))
    for name, value in planned.items():
        if value and name not in RESIDENT:
            table.add_row(name.replace("_", " "), gib(value), gib(known[name]) if name in known else "")
    table.add_row("all, at the peak", gib(sum(planned.values())), gib(found.allocated))
    rows = {"reserved by the allocator": found.reserved, "refused": found.requested, "free on the device": found.device_free}
    for name, value in rows.items():
        if value:
            table.add_row(name, "", gib(value))
    table.add_row("usable", gib(usable_bytes), "")
    return table


def largest(planned: dict[str, float]) -> str:
    """The component that takes most, in words."""
    name = max(planned, key=lambda part: planned[part])
    return f"{name.replace('_', ' ')}, {gib(planned[name])}"


def to_dict(found: Actual) -> dict[str, float]:
    """As plain JSON types."""
    return asdict(found)
