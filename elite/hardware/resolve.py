"""The machine that a configuration asks for: this one, with what was measured on it, or what a preset says another one would be."""

from dataclasses import replace
from pathlib import Path

from elite.config import Cap, HardwareConfig
from elite.errors import ConfigError, PlanError
from elite.facts import GIB, Device
from elite.hardware import profiles
from elite.hardware.calibration import calibration
from elite.hardware.detect import Gpu, Inventory, cores, disk_free, host_memory, nvml_gpus
from elite.hardware.presets import is_preset, presets, rates

CPU_FLOPS_PER_CORE_S = 50e9
"""fp32 matrix products on one core with AVX2 (assumption, not measured on this machine)."""
CPU_BF16_FLOPS_PER_CORE_S = 250e9
CPU_BF16 = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
"""The same in bf16, where torch says that the core has one of these (AMX: quickstart_cpu.json, AVX-512: quickstart_cpu_avx512.json; a small
model, whose products reach less than large ones)."""
CPU_MEMORY_BYTES_PER_S = 20e9
"""Host memory bandwidth (assumption)."""
BEFORE_AMPERE = ("efficient", "math")
"""Attention kernels that a card stands in for an older one with (`hardware.cap=emulate`)."""


def device(config: HardwareConfig, inventory: Inventory = nvml_gpus, cache: Path | None = None) -> Device:
    """The machine to plan for: this one (`auto`, `cpu`) or the preset's, present or not.

    Args:
        inventory: lists the GPUs that are here.
        cache: folder where `mode=profile` left what it measured; None plans with data sheets.

    Raises:
        ConfigError: figures of the group contradict each other.
    """
    _check(config)
    gpus = [] if config.name == "cpu" else inventory()
    if config.name == "cpu" or (config.name == "auto" and not gpus):
        found = _cpu(config.gpus)
    else:
        found = _detected(gpus, config.gpus) if config.name == "auto" else _preset(config, gpus)
    return found if cache is None or not found.present else _with_profile(found, gpus, cache)


def _with_profile(found: Device, gpus: list[Gpu], cache: Path) -> Device:
    """With what was measured on this machine, and the disk that the cache lies on."""
    profile = profiles.read(profiles.machine_of(profiles.least(gpus) if gpus else None), cache)
    emulated = found.capped and found.compute_capability is not None and found.compute_capability < (8, 0)
    kernels = BEFORE_AMPERE if emulated else None
    made = profiles.measured_rates(profile, kernels) if profile else None
    return replace(found, measured=made, disk_free_bytes=disk_free(cache))


def require_present(device: Device, config: HardwareConfig, inventory: Inventory = nvml_gpus, local: int | None = None) -> None:
    """Refuse to launch on a card, or on more cards, than are here.

    Args:
        local: how many of the device's ranks are on this machine, if a launcher has said so; unset: all.

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
    if local is not None and local > len(gpus):
        raise PlanError(f"the launcher started {local} ranks on this machine, which shows {len(gpus)} GPUs", "one rank a GPU")
    if local is None and device.count > len(gpus):
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
    total, available = host_memory()
    bf16 = _cpu_bf16()
    return Device(
        name=f"CPU, {cores()} cores",
        kind="cpu",
        present=True,
        # Without GPUs, `hardware.gpus` counts processes; they share the machine.
        count=max(1, processes),
        memory_total_bytes=total,
        memory_usable_bytes=available // max(1, processes),
        compute_capability=None,
        supports_bf16=bf16 is not None,
        matmul_flops_per_s=(bf16 or CPU_FLOPS_PER_CORE_S) * cores(),
        memory_bytes_per_s=CPU_MEMORY_BYTES_PER_S,
        host_link_bytes_per_s=CPU_MEMORY_BYTES_PER_S,
        host_ram_bytes=total,
        cores=cores(),
    )


def _cpu_bf16() -> float | None:
    """Rate of one core where matrix products in bf16 are faster than in fp32: with AMX or AVX-512 BF16. None without."""
    import torch

    has = any(getattr(torch.cpu, probe, lambda: False)() for probe in CPU_BF16)
    return CPU_BF16_FLOPS_PER_CORE_S if has else None


def context_bytes() -> int:
    """CUDA's context and libraries of one process, kept off a detected GPU's free memory."""
    return int(calibration().context.bytes)


def _detected(gpus: list[Gpu], wanted: int) -> Device:
    least = profiles.least(gpus)
    usable = min(least.free_bytes, least.total_bytes) - context_bytes()
    return _cuda(least.name, rates(least), least.compute_capability, wanted or len(gpus), least.total_bytes, max(0, usable), here=least)


def _preset(config: HardwareConfig, gpus: list[Gpu]) -> Device:
    capability = _capability(config.compute_capability)
    total = int(config.memory_gib * GIB)
    usable = int((config.memory_gib - config.reserve_gib) * GIB)
    count = config.gpus or 1
    if gpus and config.cap is not Cap.none and all(gpu.total_bytes - context_bytes() >= usable for gpu in gpus):
        own = gpus[0]
        emulated = config.cap is Cap.emulate
        name = f"{own.name} {'as' if emulated else 'held to'} {config.name}"
        return _cuda(name, rates(own), capability if emulated else own.compute_capability, count, total, usable, here=own, capped=True)
    present = bool(gpus) and all(is_preset(gpu, config) for gpu in gpus)
    return _cuda(config.name, config, capability, count, total, usable, here=gpus[0] if present else None)


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
    here: Gpu | None,
    capped: bool = False,
) -> Device:
    link = here.link_bytes_per_s if here else 0.0
    return Device(
        name=name,
        kind="cuda",
        present=here is not None,
        count=count,
        memory_total_bytes=total,
        memory_usable_bytes=usable,
        compute_capability=capability,
        # Ampere brought bf16 to the tensor cores.
        supports_bf16=capability >= (8, 0),
        matmul_flops_per_s=figures.matmul_tflops * 1e12,
        memory_bytes_per_s=figures.bandwidth_gb_s * 1e9,
        host_link_bytes_per_s=link or figures.pcie_gb_s * 1e9,
        host_ram_bytes=host_memory()[0] if here else int(figures.host_ram_gib * GIB),
        cores=cores(),
        capped=capped,
        link_bytes_per_s=figures.link_gb_s * 1e9,
    )
