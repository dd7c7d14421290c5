"""Tables of what fused kernels change of whole steps and of loss curves.

They are made of `fused_steps.json` (elite.bench.fused) and `kernel_curves.json` (elite.bench.kernel_curves).
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

from elite.report.markdown import NONE, gibibytes, grid, missing, origin, passed

STEPS = "fused_steps"
CURVES = "kernel_curves"
BASES = {"speed against unfused": "unfused", "against transformers with Liger": "transformers, peft, liger-kernel"}
"""Columns of ratios, and the run that each is against."""


def steps(folder: Path) -> str:
    """Whole steps with and without fused kernels, and those of others."""
    path = folder / f"{STEPS}.json"
    if not path.exists():
        return missing(path.name)
    found = json.loads(path.read_text())
    known = {(_place(run), run["name"]): run for run in found["runs"]}
    rows = []
    for (place, name), run in known.items():
        seconds, ratios = _seconds(run), []
        for base in BASES.values():
            other = known.get((place, base))
            ratios.append(NONE if other is None else f"{_seconds(other) / seconds:.2f}×")
        peak = max(step["allocated_peak_bytes"] for step in run["steps"])
        model, context, batch = place
        profile = run.get("profile")
        waits = f"{profile['host_s'] / profile['wall_s']:.0%}" if profile else NONE
        rows.append(
            (model, passed(batch, context), name, f"{seconds:.3f}", f"{batch * context / seconds:,.0f}", *ratios, gibibytes(peak), waits)
        )
    said = origin([found["environment"]], [run["device"] for run in found["runs"]])
    head = ("model", "context", "run", "step s", "tokens/s", *BASES, "peak GiB allocated", "waiting for the host")
    how = "Random weights and tokens, LoRA of rank 8, gradient checkpointing; median of the steps after the first"
    return grid(head, rows) + f"\n\n{how}. {said}."


def curves(folder: Path) -> str:
    """Loss curves with each kernel against none."""
    path = folder / f"{CURVES}.json"
    if not path.exists():
        return missing(path.name)
    found = json.loads(path.read_text())
    rows = []
    for run in found["runs"]:
        limits = run["limits"]
        pairs = ((run["max_difference"], limits["max_difference"], 4), (run["mean_drift"], limits["mean_drift"], 5))
        cells = [f"{value:.{digits}f}" for *values, digits in pairs for value in values]
        weights = run["plain"]["model"]["weights"]
        rows.append((f"{run['model']} ({weights})", run["adapter"], ", ".join(run["parts"]), *cells, "yes" if run["within"] else "no"))
    head = ("model", "trained", "kernels", "largest difference of a loss", "allowed", "mean drift", "allowed", "within")
    plain = found["runs"][0]["plain"]
    said = origin([found["environment"]], [plain["device"]])
    return grid(head, rows) + f"\n\nNats, {plain['dtype']}; {found['steps']} steps of {plain['context']:,} tokens; {said}."


def _place(run: dict[str, Any]) -> tuple[str, int, int]:
    # Files of before had passes of one sequence alone.
    return run["model"]["name"], run["context"], run.get("micro_batch", 1)


def _seconds(run: dict[str, Any]) -> float:
    return median(step["step_s"] for step in run["steps"][1:] or run["steps"])
