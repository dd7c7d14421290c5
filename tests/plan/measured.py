"""Steps that were really taken, with what a plan needs to know of them: read from docs/measurements."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from elite import geometry, hardware
from elite.config import Cap, ModelConfig
from elite.facts import Device, Facts
from elite.hardware import Gpu
from elite.optimizations import decide
from elite.plan import streamed
from elite.plan.time import StepTime, recomputed, step_time
from elite.report.measurement import MEASUREMENTS
from elite.streaming import Streaming
from tests.plan.helpers import hardware_config, model_config, switches

H100 = Gpu("NVIDIA H100 80GB HBM3", 85_520_809_984, 85_000_000_000, (9, 0))


@dataclass(frozen=True)
class Measured:
    """One run: what it was, and the seconds of its step."""

    name: str
    step_s: float
    planned: StepTime
    probed: bool = False
    """Extrapolated from a few chunks."""


def device_named(name: str) -> Device:
    """The device that a file names: a CPU, an H100, or one held to a preset or standing in for it."""
    if name.startswith("CPU"):
        return hardware.device(hardware_config("cpu"), lambda: [])
    if " held to " in name or " as " in name:
        preset = name.split(" ")[-1]
        cap = Cap.memory if " held to " in name else Cap.emulate
        return hardware.device(replace(hardware_config(preset), cap=cap), lambda: [H100])
    return hardware.device(hardware_config("auto"), lambda: [H100])


def planned(
    device: Device, model: ModelConfig, context: int, rank: int, active: list[str], layout: dict[str, Any] | None, accumulation: int
) -> StepTime:
    """The time that the model predicts for a described run."""
    shape = geometry.shape(model)
    executor = "whole" if layout is None else "streamed"
    # Optional packages need not be here to plan with.
    facts = Facts(shape, replace(device, present=False), context, 1, shape.lora_params(rank), "lora", executor)
    decisions = decide(switches(*active), facts)
    assert sorted(d.name for d in decisions if d.active) == sorted(active)
    if layout is None:
        return step_time(facts, decisions, recomputed(decisions), accumulation)
    how = Streaming.from_dict(layout)
    return step_time(facts, decisions, streamed.recomputed(facts, how), accumulation, how)


def benchmarks() -> Iterator[Measured]:
    """Steps on random tokens: the peers' comparison, and probes that were followed by whole steps."""
    runs = json.loads((MEASUREMENTS / "streamed_peers.json").read_text())["runs"]
    probes = [(path, json.loads(path.read_text())) for path in sorted(MEASUREMENTS.glob("probe_*.json"))]
    named = [(f"{run['name']} {run['context']}", run) for run in runs] + [(path.stem, run) for path, run in probes]
    for name, run in named:
        steps = [step["step_s"] for step in run["steps"]]
        # The first of several steps warms up; a probe has warmed up before its first.
        seconds = median(steps[1:] or steps) if steps else run["probe"]["step_s"]
        yield Measured(name, seconds, _planned(run), probed=not steps)


def _planned(run: dict[str, Any]) -> StepTime:
    described = run["model"]
    names = ("num_hidden_layers", "num_key_value_heads")
    model = replace(model_config(described["name"]), **{name: described[name] for name in names})
    rank = int(described["adapter"].split("rank ")[1])
    return planned(device_named(run["device"]), model, run["context"], rank, run["active"], run["layout"], 1)


def trainings(name: str) -> Iterator[Measured]:
    """Runs on a real corpus."""
    for run in json.loads(Path(MEASUREMENTS / f"{name}.json").read_text())["runs"]:
        config, plan = run["config"], run["plan"]
        model = ModelConfig(**{key: value for key, value in config["model"].items() if key != "weights"})
        active = [decision["name"] for decision in plan["decisions"] if decision["active"]]
        made = planned(
            device_named(run["environment"]["device"]["name"]),
            model,
            config["tier"]["context"],
            config["adapter"]["rank"],
            active,
            plan.get("layout"),
            plan["accumulation"],
        )
        yield Measured(
            f"{name} {model.name} {config['tier']['context']} {config['optimizations']['preset']}", run["summary"]["step_s"], made
        )
