"""Predicted against measured step times: every measurement file that describes a run well enough to plan it again."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf

from elite import geometry, hardware
from elite.config import CONF_DIR, Cap, HardwareConfig, ModelConfig
from elite.facts import Device, Facts
from elite.hardware import Gpu
from elite.optimizations import ALL, OptimizationsConfig, decide
from elite.plan import streamed
from elite.plan.rates import rates_of
from elite.plan.time import StepTime, recomputed, step_time
from elite.plan.words import duration
from elite.report.markdown import grid, missing, passed
from elite.streaming import Streaming

GPUS = (
    Gpu("NVIDIA H100 80GB HBM3", 85_520_809_984, 85_000_000_000, (9, 0)),
    Gpu("NVIDIA H200", 150_754_820_096, 150_000_000_000, (9, 0)),
)
"""What benchmarks ran on."""
BENCHMARKS = ("streamed_peers", "fused_steps")
TRAININGS = ("first_gpu", "extreme_phi2", "streamed_training", "quickstart_cpu", "quickstart_cpu_avx512")
OWN_MAPS = (0, 7, 4)
"""Version from which a kernel of ours makes four-bit maps whole."""
OWN_THREAD = (0, 7, 1)
"""Version from which the thread that asks for a backward runs it."""
OTHER_THREAD = 1.42
"""Host time of an operation before that, over now's (fitted to first_gpu.json and streamed_training.json, whose short contexts waited for
the host)."""


@dataclass(frozen=True)
class Measured:
    """One run: what it was, and the seconds of its step."""

    file: str
    name: str
    model: str
    context: str
    """Tokens of a sequence, and how many a pass takes."""
    executor: str
    device: str
    step_s: float
    planned: StepTime
    probed: bool = False
    """Extrapolated from a few chunks."""

    @property
    def error(self) -> float:
        """Planned over real, less one."""
        return self.planned.total / self.step_s - 1


def measured_steps(folder: Path) -> tuple[Measured, ...]:
    """All of them, probes first."""
    named = [(path.stem, "probe", json.loads(path.read_text())) for path in sorted(folder.glob("probe_*.json"))]
    # What others' programs did has no layout, not even an empty one.
    named += [(name, run["name"], run) for name in BENCHMARKS for run in _runs(folder, name) if "layout" in run]
    # A benchmark's file gives only a part of the geometry; the rest is the preset's.
    found = [_benchmark(*line) for line in named if _preset_file(line[2]).exists()]
    return (*found, *(_training(name, run) for name in TRAININGS for run in _runs(folder, name) if _is_as_now(run)))


def table(folder: Path) -> str:
    """A row for each run, and how far off they are in all."""
    found = measured_steps(folder)
    if all(run.probed for run in found):
        return missing(f"{BENCHMARKS[0]}.json")
    rows = [
        (
            f"`{run.file}`" + ("" if run.name == "probe" else f", {run.name}"),
            run.model,
            run.context,
            run.executor,
            run.device,
            duration(run.step_s) + (" (probed)" if run.probed else ""),
            duration(run.planned.total),
            f"{run.error:+.1%}",
        )
        for run in found
    ]
    errors = [abs(run.error) for run in found if not run.probed]
    said = f"{len(errors)} whole steps: median error {median(errors):.1%}, largest {max(errors):.1%}."
    return grid(("file", "model", "context", "executor", "device", "step", "planned", "error"), rows) + f"\n\n{said}"


def _runs(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    path = folder / f"{name}.json"
    yield from json.loads(path.read_text())["runs"] if path.exists() else ()


def _is_as_now(run: dict[str, Any]) -> bool:
    """Whether such steps are still taken: four-bit maps were bitsandbytes', which took the host longer, before `OWN_MAPS`."""
    active = {decision["name"] for decision in run["plan"]["decisions"] if decision["active"]}
    return "qlora" not in active or _version(run) >= OWN_MAPS


def _version(run: dict[str, Any]) -> tuple[int, ...]:
    return tuple(map(int, run["environment"]["elite"].split(".")))


def _preset_file(run: dict[str, Any]) -> Path:
    return CONF_DIR / "model" / f"{run['model']['name']}.yaml"


def _benchmark(file: str, name: str, run: dict[str, Any]) -> Measured:
    """A run on random tokens, or a probe and the whole steps after it."""
    described, steps = run["model"], [step["step_s"] for step in run["steps"]]
    # The first of several steps warms up; a probe has warmed up before its first.
    seconds = median(steps[1:] or steps) if steps else run["probe"]["step_s"]
    preset = ModelConfig(**OmegaConf.to_container(OmegaConf.load(_preset_file(run))))  # type: ignore[arg-type]
    model = replace(preset, **{key: described[key] for key in ("num_hidden_layers", "num_key_value_heads")})
    rank = int(described["adapter"].removeprefix("lora, rank "))
    # Files of before benchmarks took several sequences a pass do not say that it is one.
    sequences = run.get("micro_batch", 1)
    planned = _planned(_benchmark_device(run["device"]), model, (sequences, run["context"]), rank, run["active"], run["layout"], 1)
    layers = "" if described["num_hidden_layers"] > 1 else ", one layer"
    context = passed(sequences, run["context"])
    return Measured(file, name, model.name + layers, context, run["executor"], run["device"], seconds, planned, not steps)


def _training(file: str, run: dict[str, Any]) -> Measured:
    """A run on a real corpus, on the device that it was planned for."""
    config, plan, device = run["config"], run["plan"], dict(run["environment"]["device"])
    # Planned by the data sheet, as all others are, whatever was known of that machine.
    device.pop("measured", None)
    device["compute_capability"] = tuple(device["compute_capability"]) if device["compute_capability"] else None
    model = ModelConfig(**{key: value for key, value in config["model"].items() if key != "weights"})
    active, context = [decision["name"] for decision in plan["decisions"] if decision["active"]], config["tier"]["context"]
    machine = Device(**device)
    if machine.kind == "cuda" and _version(run) < OWN_THREAD:
        rates = rates_of(machine)
        machine = replace(machine, measured=replace(rates, operation_s=OTHER_THREAD * rates.operation_s))
    planned = _planned(machine, model, (1, context), config["adapter"]["rank"], active, plan.get("layout"), plan["accumulation"])
    preset = config["optimizations"]["preset"]
    return Measured(file, preset, model.name, passed(1, context), plan["executor"], device["name"], run["summary"]["step_s"], planned)


def _benchmark_device(name: str) -> Device:
    """A GPU by itself, held to a preset or standing in for it."""
    gpu = next(gpu for gpu in GPUS if name.startswith(gpu.name))
    for words, cap in ((" held to ", Cap.memory), (" as ", Cap.emulate)):
        if words in name:
            return hardware.device(replace(hardware.presets()[name.rpartition(words)[2]], cap=cap), lambda: [gpu])
    return hardware.device(HardwareConfig(), lambda: [gpu])


def _planned(
    device: Device,
    model: ModelConfig,
    size: tuple[int, int],
    rank: int,
    active: list[str],
    layout: dict[str, Any] | None,
    accumulation: int,
) -> StepTime:
    shape, (sequences, context) = geometry.shape(model), size
    # As if it were elsewhere: optional packages need not be here to plan with.
    facts = Facts(
        *(shape, replace(device, present=False), context, sequences, shape.lora_params(rank), "lora"),
        "whole" if layout is None else "streamed",
    )
    switches: dict[str, Any] = {kind.name: kind.Config(enabled=kind.name in active) for kind in ALL}
    decisions = decide(OptimizationsConfig(**switches), facts)
    how = None if layout is None else Streaming.from_dict(layout)
    again = recomputed(decisions) if how is None else streamed.recomputed(facts, how)
    return step_time(facts, decisions, again, accumulation, how)
