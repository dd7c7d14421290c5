"""Tables of what several GPUs of one machine bring: against one of them, weights divided under a cap, errors of gradients.

They are made of `ranks.json` (elite.bench.ranks) and `ranks_gradients.json` (elite.bench.ranks_gradients). A table whose file is not there
says so.
"""

import json
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from elite.compose import from_overrides
from elite.report.markdown import NONE, gibibytes, grid, missing, origin

RANKS = "ranks"
GRADIENTS = "ranks_gradients"
SHARED_SPEED, OWN_SPEED = 1.8, 1.9
"""Times one GPU's tokens/s that two must reach: together on one sequence, and on one each."""
KEYS_VALUES = 0.6
"""Of one GPU's bytes of keys and values that each of two may hold."""
ERROR = 1.1
"""Times one GPU's bf16 error that sharing may make of it."""


def against_one(folder: Path) -> str:
    """Throughput and memory of all GPUs against one, by case."""
    found = _read(folder, RANKS)
    if found is None:
        return missing(f"{RANKS}.json")
    runs = {(run["case"], run["ranks"]): run for run in found["runs"]}
    rows = []
    for case in dict.fromkeys(run["case"] for run in found["runs"]):
        one, all_of_them = runs.get((case, 1)), max((run for run in found["runs"] if run["case"] == case), key=lambda run: run["ranks"])
        if one is None or all_of_them is one:
            continue
        shared = all_of_them["sharing"] > 1
        speeds = [_speed(run) for run in (one, all_of_them)]
        rows.append(
            (
                _model(all_of_them),
                f"{all_of_them['context']:,}",
                f"{all_of_them['ranks']}, {'one sequence' if shared else _own(all_of_them)}",
                *(f"{speed:,.0f}" for speed in speeds),
                _judged(speeds[1] / speeds[0], SHARED_SPEED if shared else OWN_SPEED, "≥"),
                _judged(_held(all_of_them) / _held(one), KEYS_VALUES, "≤") if shared else NONE,
                *(gibibytes(_highest(run, "allocated_peak_bytes")) for run in (one, all_of_them)),
            )
        )
    head = ("model", "context", "GPUs", "one GPU, tokens/s", "all, tokens/s", "ratio", "keys and values of a GPU, ratio")
    said = "Random weights and tokens, LoRA of rank 8; median of the steps after the first, memory of the GPU that has most"
    return grid((*head, "peak GiB, one GPU", "peak GiB, all"), rows) + f"\n\n{said}. {_origin(found)}."


def divided(folder: Path) -> str:
    """What only all GPUs together have room for: planned and measured memory under the cap."""
    found = _read(folder, RANKS)
    if found is None:
        return missing(f"{RANKS}.json")
    alone = {run["case"] for run in found["runs"] if run["ranks"] == 1}
    rows = []
    for run in found["runs"]:
        if run["case"] in alone:
            continue
        held = {True: ", held", False: ", not held", None: ""}[run["cap_holds"]]
        rows.append(
            (
                f"{run['model']['name']}, {run['model']['adapter']}",
                f"{run['context']:,}",
                str(run["ranks"]),
                f"{gibibytes(run['usable_bytes'])}{held}",
                gibibytes(run["planned"]["device_bytes"]),
                *(gibibytes(_highest(run, name)) for name in ("allocated_peak_bytes", "reserved_peak_bytes", "device_bytes")),
                gibibytes(run["planned"]["host_bytes"]),
                *(gibibytes(_highest(run, name)) for name in ("host_pinned_bytes", "host_rss_peak_bytes")),
                f"{_median(run, 'step_s'):.1f}",
                f"{run['ready_s']:.0f}",
            )
        )
    device = ("usable GiB of a GPU", "peak planned", "allocated", "reserved", "the driver shows")
    host = ("host GiB planned", "pinned", "resident")
    head = ("model, trained", "context", "GPUs", *device, *host, "step s", "until the first s")
    return grid(head, rows) + f"\n\nRandom weights and tokens; memory of one rank, of the one that has most. {_origin(found)}."


def gradients(folder: Path) -> str:
    """Errors of bf16 gradients of all GPUs together against one GPU's own."""
    found = _read(folder, GRADIENTS)
    if found is None:
        return missing(f"{GRADIENTS}.json")
    rows = []
    for run in found["runs"]:
        for name, ratios in run["ratios"].items():
            shared = name not in run["alone"]
            mean = _judged(ratios["mean_ratio"], ERROR, "≤") if shared else f"{ratios['mean_ratio']:.3f}×"
            counts = (str(ratios[key]) for key in ("tensors_above", "tensors_below"))
            rest = (f"{ratios['median_ratio']:.3f}×", f"{ratios['worst_ratio']:.2f}×", *counts, str(run["tensors"]))
            rows.append((run["adapter"], name, f"{found['ranks']}" if shared else "1", mean, *rest))
    head = ("trained", "pass", "GPUs", "error over one GPU's, mean", "median", "worst", "above 1.1×", "below 1 / 1.1×", "tensors")
    said = (
        f"{found['model']['name']}, {found['rows']} × {found['context']:,} tokens, {found['dtype']}, against fp32. Passes of one GPU "
        "are held against its ordinary one, those of all against one GPU's with the same executor"
    )
    return grid(head, rows) + f"\n\n{said}. {origin([found['environment']], [found['device']])}."


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def _model(run: dict[str, Any]) -> str:
    """Its name, and how much of it there was."""
    model = run["model"]
    own, layers = _layers(model["name"]), model["num_hidden_layers"]
    return str(model["name"]) if layers == own else f"{model['name']}, {layers} of its {own} layers"


@cache
def _layers(model: str) -> int:
    """Of a preset, whose configuration takes a while to compose."""
    return from_overrides(f"model={model}").config.model.num_hidden_layers


def _own(run: dict[str, Any]) -> str:
    """What a rank goes through by itself in a step."""
    if run["micro_batch"] > 1:
        return f"{run['micro_batch']} sequences each, together"
    return "one sequence each" if run["passes"] == 1 else f"{run['passes']} sequences each, one a pass"


def _judged(ratio: float, target: float, sign: str) -> str:
    met = ratio >= target if sign == "≥" else ratio <= target
    return f"{ratio:.2f}× ({sign} {target}×: {'met' if met else 'missed'})"


def _speed(run: dict[str, Any]) -> float:
    return _median(run, "tokens_per_s")


def _median(run: dict[str, Any], name: str) -> float:
    """Of the steps after the first, which warms up."""
    return median(step[name] for step in run["steps"][1:])


def _highest(run: dict[str, Any], name: str) -> float | None:
    """Of all steps; None where it was not counted."""
    return max((step[name] for step in run["steps"] if name in step), default=None)


def _held(run: dict[str, Any]) -> float:
    return max(float(step["keys_values_bytes"]) for step in run["steps"])


def _origin(found: dict[str, Any]) -> str:
    return origin([run["environment"] for run in found["runs"]], [run["device"] for run in found["runs"]])
