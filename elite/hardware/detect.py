"""What is in this machine: GPUs by the driver, host memory, cores, disk.

GPUs are counted through the driver's management library, so that the planning process never holds a CUDA context.
"""

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""Of one PCIe lane in one direction, by generation (PCI-SIG)."""
PCIE_SHARE = 0.78
"""Of a PCIe link's rate that copies from pinned memory reach (assumption; mode=profile measures it)."""
DISK_READ_BYTES_PER_S = 2e9
DISK_WRITE_BYTES_PER_S = 1e9
"""An NVMe disk under sustained load (assumption; mode=profile measures it)."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver describes it; bytes."""

    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]
    driver: str = ""
    link_bytes_per_s: float = 0.0
    """Of its PCIe link in one direction, as reached in practice; 0 where the driver does not say."""


Inventory = Callable[[], list[Gpu]]


def nvml_gpus() -> list[Gpu]:
    """The CUDA GPUs visible to this process, without initialising CUDA; empty where there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        chosen = [handles[i] for i in visible(uuids, os.environ.get("CUDA_VISIBLE_DEVICES"))]
        return [_gpu(handle) for handle in chosen]
    finally:
        pynvml.nvmlShutdown()


def _gpu(handle: Any) -> Gpu:
    import pynvml

    memory, capability = pynvml.nvmlDeviceGetMemoryInfo(handle), pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(
        name=_text(pynvml.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        compute_capability=(capability[0], capability[1]),
        driver=_text(pynvml.nvmlSystemGetDriverVersion()),
        link_bytes_per_s=_link(handle),
    )


def _link(handle: Any) -> float:
    """Bytes a second over the card's PCIe link, one direction; the largest it can be here, for it is trained down while idle."""
    import pynvml

    try:
        generation, width = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle), pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
    except pynvml.NVMLError:
        # Virtual GPUs and some boards have none to speak of.
        return 0.0
    return link_rate(generation, width)


def link_rate(generation: int, width: int) -> float:
    """Bytes a second of a PCIe link in one direction, as copies reach it; 0 for a generation that is not known."""
    return PCIE_SHARE * LANE_BYTES_PER_S.get(generation, 0.0) * width


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def visible(uuids: list[str], setting: str | None) -> list[int]:
    """Indices that CUDA_VISIBLE_DEVICES=`setting` leaves, in its order; as CUDA does, reading stops at the first invalid entry."""
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in setting.split(","):
        entry = entry.strip()
        found = [i for i, uuid in enumerate(uuids) if entry == str(i) or (entry.startswith("GPU-") and uuid.startswith(entry))]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return chosen


def host_memory() -> tuple[int, int]:
    """Total and available host memory in bytes, as far as this process may use it."""
    import psutil

    memory = psutil.virtual_memory()
    return _within_container(int(memory.total), int(memory.available))


def _within_container(total: int, available: int) -> tuple[int, int]:
    """Total and available host memory, held to the control group's limit where one is set."""
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if not limit.is_file() or not used.is_file() or limit.read_text().strip() == "max":
        return total, available
    bound = int(limit.read_text())
    return min(total, bound), min(available, bound - int(used.read_text()))


def disk_free(folder: Path) -> int:
    """Bytes free where `folder` is or would be."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """The processor, as the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
