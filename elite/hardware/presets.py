"""Cards that a plan can be made for, and which of them describes a GPU that is here."""

from functools import lru_cache

from omegaconf import OmegaConf

from elite.config import CONF_DIR, HardwareConfig
from elite.facts import GIB
from elite.hardware.detect import Gpu

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


@lru_cache
def presets() -> dict[str, HardwareConfig]:
    """Every preset with figures, by name, read from `conf/hardware`."""
    found = {}
    for file in sorted((CONF_DIR / "hardware").glob("*.yaml")):
        config = HardwareConfig(**OmegaConf.to_container(OmegaConf.load(file)))  # type: ignore[arg-type]
        if config.memory_gib:
            found[config.name] = config
    return found


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
