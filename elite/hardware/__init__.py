"""What the machine offers, or what a preset says another one would."""

from elite.hardware.detect import Gpu, Inventory, host_memory, nvml_gpus, visible
from elite.hardware.presets import is_preset, presets, rates
from elite.hardware.resolve import context_bytes, device, require_present

__all__ = [
    "Gpu",
    "Inventory",
    "context_bytes",
    "device",
    "host_memory",
    "is_preset",
    "nvml_gpus",
    "presets",
    "rates",
    "require_present",
    "visible",
]
