"""Devices, shapes and configurations to plan with."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from elite import geometry, hardware
from elite.config import CONF_DIR, AdapterConfig, Executor, ExecutorConfig, HardwareConfig, ModelConfig, RunConfig, TierConfig
from elite.facts import Corpus, Device, ModelShape
from elite.optimizations import ALL, OptimizationsConfig

STANDARD = ("memory_mapped_data", "sequence_packing", "mixed_precision", "flash_attention", "gradient_checkpointing")
CORPUS = Corpus("here", 900, 100, 3_000_000, 300_000, 12_000_000, "exact", {"binary": 3})


@cache
def model_config(name: str) -> ModelConfig:
    return ModelConfig(**OmegaConf.to_container(OmegaConf.load(CONF_DIR / "model" / f"{name}.yaml")))  # type: ignore[arg-type]


@cache
def hardware_config(name: str) -> HardwareConfig:
    return HardwareConfig(**OmegaConf.to_container(OmegaConf.load(CONF_DIR / "hardware" / f"{name}.yaml")))  # type: ignore[arg-type]


def hardware_names() -> list[str]:
    return sorted(Path(file).stem for file in (CONF_DIR / "hardware").glob("*.yaml"))


def phi2() -> ModelShape:
    return geometry.shape(model_config("phi2"))


def device(name: str) -> Device:
    return hardware.device(hardware_config(name), lambda: [])


def switches(*names: str) -> OptimizationsConfig:
    enabled: dict[str, Any] = {kind.name: kind.Config(enabled=kind.name in names) for kind in ALL}
    return OptimizationsConfig(**enabled)


def run_config(context: int = 4096, on: tuple[str, ...] = STANDARD, model: str = "phi2", executor: Executor = Executor.whole) -> RunConfig:
    tier = TierConfig(name="tier1", context=context, target_length=min(context // 8, 16384), lora_rank=16)
    made = replace(RunConfig(), tier=tier, model=model_config(model), adapter=AdapterConfig(rank=16), optimizations=switches(*on))
    return replace(made, executor=ExecutorConfig(name=executor))
