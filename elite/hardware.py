"""What the machine offers, or what a preset says another one would.

GPUs are counted through the driver's management library, so that the planning process never holds a CUDA context.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from omegaconf import OmegaConf

from elite.config import CONF_DIR, Cap, HardwareConfig
from elite.errors import ConfigError, PlanError
from elite.facts import GIB, Device

DETECTED_RESERVE_BYTES = int(0.6 * GIB)
"""CUDA context and kernels of one process, kept off a detected GPU's free memory (assumption: 0.4–0.6 GiB are usual)."""
CPU_FLOPS_PER_CORE_S = 50e9
"""fp32 matrix products on one core with AVX2 (assumption, not measured on this machine)."""
CPU_MEMORY_BYTES_PER_S = 20e9
"""Host memory bandwidth (assumption)."""

# Substrings of the driver's name for a card → presets that have its rates. Several: the one nearest in memory.
CARDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("RTX 2060 SUPER", ("rtx2060s",)),
    ("RTX 3060", ("rtx3060",)),
    ("RTX 3090", ("rtx3090",)),
    ("RTX 4090", ("rtx4090",)),
    ("RTX 5090", ("rtx5090",)),
    ("A100", ("a100_40gb", "a100_80gb")),
    ("H100", ("h100",)),
    ("H200", ("h200",)),
)
# For any other GPU, rates of the slowest preset of its generation, so that time errs on the long side (assumption).
GENERATIONS: tuple[tuple[tuple[int, int], str], ...] = (
    ((12, 0), "rtx5090"),
    ((9, 0), "h100"),
    ((8, 9), "rtx4090"),
    ((8, 6), "rtx3060"),
    ((8, 0), "a100_40gb"),
    ((0, 0), "rtx2060s"),
)
SAME_CARD_MEMORY = 0.08
"""A card is the preset's own if its name fits and its memory differs by less than this share (drivers round differently)."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver describes it; bytes."""

    name: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int]


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
        gpus = []
        for handle in chosen:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
            gpus.append(Gpu(_text(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free), (capability[0], capability[1])))
        return gpus
    finally:
        pynvml.nvmlShutdown()


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


@lru_cache
def presets() -> dict[str, HardwareConfig]:
    """Every preset with figures, by name, read from `conf/hardware`."""
    found = {}
    for file in sorted((CONF_DIR / "hardware").glob("*.yaml")):
        config = HardwareConfig(**OmegaConf.to_container(OmegaConf.load(file)))  # type: ignore[arg-type]
        if config.memory_gib:
            found[config.name] = config
    return found


def device(config: HardwareConfig, inventory: Inventory = nvml_gpus) -> Device:
    """The machine to plan for: this one (`auto`, `cpu`) or the preset's, present or not.

    Args:
        inventory: lists the GPUs that are here.

    Raises:
        ConfigError: figures of the group contradict each other.
    """
    _check(config)
    if config.name == "cpu":
        return _cpu(config.gpus)
    gpus = inventory()
    if config.name == "auto":
        return _detected(gpus, config.gpus) if gpus else _cpu(config.gpus)
    return _preset(config, gpus)


def require_present(device: Device, config: HardwareConfig, inventory: Inventory = nvml_gpus) -> None:
    """Refuse to launch on a card, or on more cards, than are here.

    Raises:
        PlanError: the preset's card is not in this machine, or fewer GPUs than asked for.
    """
    if device.kind == "cpu":
        return
    gpus = inventory()
    if not device.present:
        here = ", ".join(gpu.name for gpu in gpus) or "no CUDA GPU"
        larger = any(gpu.total_bytes >= device.memory_total_bytes for gpu in gpus)
        cap = "; hardware.cap=memory holds a larger GPU to this preset" if larger else ""
        raise PlanError(
            f"hardware={config.name} is not in this machine (found: {here})",
            f"mode=plan plans for it anyway; hardware=auto trains on what is here{cap}",
        )
    if device.count > len(gpus):
        raise PlanError(f"hardware.gpus={device.count}, but this machine shows {len(gpus)}", f"hardware.gpus={len(gpus)}")


def _check(config: HardwareConfig) -> None:
    if config.gpus < 0:
        raise ConfigError(f"hardware.gpus={config.gpus}: must not be negative", "hardware.gpus=0 takes all that are there")
    if config.name in ("auto", "cpu"):
        if config.cap is not Cap.none:
            raise ConfigError(
                f"hardware.cap={config.cap.value} needs a preset, not hardware={config.name}", "hardware=rtx3090 hardware.cap=memory"
            )
        return
    figures = ("memory_gib", "matmul_tflops", "bandwidth_gb_s", "pcie_gb_s", "host_ram_gib")
    for name in figures:
        if getattr(config, name) <= 0:
            raise ConfigError(f"hardware.{name}={getattr(config, name)}: must be positive", f"choose a preset: {', '.join(presets())}")
    if not 0 <= config.reserve_gib < config.memory_gib:
        raise ConfigError(
            f"hardware.reserve_gib={config.reserve_gib} leaves nothing of {config.memory_gib} GiB", "hardware.reserve_gib=0.8 is usual"
        )


def _cpu(processes: int) -> Device:
    cores = len(os.sched_getaffinity(0))
    total, available = host_memory()
    return Device(
        name=f"CPU, {cores} cores",
        kind="cpu",
        present=True,
        # Without GPUs, `hardware.gpus` counts processes; they share the machine.
        count=max(1, processes),
        memory_total_bytes=total,
        memory_usable_bytes=available // max(1, processes),
        compute_capability=None,
        supports_bf16=_cpu_has_bf16(),
        matmul_flops_per_s=CPU_FLOPS_PER_CORE_S * cores,
        memory_bytes_per_s=CPU_MEMORY_BYTES_PER_S,
        host_link_bytes_per_s=CPU_MEMORY_BYTES_PER_S,
        host_ram_bytes=total,
        cores=cores,
    )


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


def _cpu_has_bf16() -> bool:
    """Whether matrix products in bf16 are faster than in fp32: AVX-512 BF16 or AMX."""
    import torch

    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))


def _detected(gpus: list[Gpu], wanted: int) -> Device:
    # All ranks do the same, so the smallest card decides.
    least = min(gpus, key=lambda gpu: min(gpu.free_bytes, gpu.total_bytes))
    usable = min(least.free_bytes, least.total_bytes) - DETECTED_RESERVE_BYTES
    return _cuda(least.name, rates(least), least.compute_capability, wanted or len(gpus), least.total_bytes, max(0, usable), present=True)


def _preset(config: HardwareConfig, gpus: list[Gpu]) -> Device:
    capability = _capability(config.compute_capability)
    total = int(config.memory_gib * GIB)
    usable = int((config.memory_gib - config.reserve_gib) * GIB)
    count = config.gpus or 1
    if gpus and config.cap is not Cap.none and all(gpu.total_bytes - DETECTED_RESERVE_BYTES >= usable for gpu in gpus):
        own = gpus[0]
        emulated = config.cap is Cap.emulate
        name = f"{own.name} {'as' if emulated else 'held to'} {config.name}"
        return _cuda(name, rates(own), capability if emulated else own.compute_capability, count, total, usable, present=True, capped=True)
    present = bool(gpus) and all(is_preset(gpu, config) for gpu in gpus)
    return _cuda(config.name, config, capability, count, total, usable, present=present)


def rates(gpu: Gpu) -> HardwareConfig:
    """The preset whose rates describe this card: its own, or its generation's."""
    names = next((names for card, names in CARDS if card in gpu.name.upper()), None)
    if names is None:
        names = (next(name for least, name in GENERATIONS if gpu.compute_capability >= least),)
    return min((presets()[name] for name in names), key=lambda preset: abs(preset.memory_gib * GIB - gpu.total_bytes))


def is_preset(gpu: Gpu, config: HardwareConfig) -> bool:
    """Whether this GPU is the preset's card. Laptop and Ti namesakes differ in memory."""
    named = any(card in gpu.name.upper() and config.name in names for card, names in CARDS)
    return named and abs(gpu.total_bytes / GIB / config.memory_gib - 1) < SAME_CARD_MEMORY


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        raise ConfigError(f"hardware.compute_capability={text!r} is not of the form 8.6", "hardware.compute_capability='8.6'")
    return int(major), int(minor)


def _cuda(
    name: str,
    figures: HardwareConfig,
    capability: tuple[int, int],
    count: int,
    total: int,
    usable: int,
    *,
    present: bool,
    capped: bool = False,
) -> Device:
    return Device(
        name=name,
        kind="cuda",
        present=present,
        count=count,
        memory_total_bytes=total,
        memory_usable_bytes=usable,
        compute_capability=capability,
        # Ampere brought bf16 to the tensor cores.
        supports_bf16=capability >= (8, 0),
        matmul_flops_per_s=figures.matmul_tflops * 1e12,
        memory_bytes_per_s=figures.bandwidth_gb_s * 1e9,
        host_link_bytes_per_s=figures.pcie_gb_s * 1e9,
        host_ram_bytes=host_memory()[0] if present else int(figures.host_ram_gib * GIB),
        cores=len(os.sched_getaffinity(0)),
        capped=capped,
    )
