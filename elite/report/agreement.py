"""Tables that hold the streamed executor against the ordinary pass: errors of gradients, curves of losses.

They are made of `streamed_gradients.json` (elite.bench.gradients) and `streamed_curves.json` (elite.bench.curves).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elite.report.markdown import NONE, grid, missing, origin

GRADIENTS = "streamed_gradients"
CURVES = "streamed_curves"
YARDSTICKS = {"repeated": "ordinary, a second time", "other_kernel": "ordinary, another attention kernel"}


def gradients(folder: Path) -> str:
    """Errors of bf16 gradients against fp32, tensor by tensor."""
    path = folder / f"{GRADIENTS}.json"
    if not path.exists():
        return missing(path.name)
    found = json.loads(path.read_text())
    rows = [row for run in found["runs"] for row in _passes(run)]
    head = ("trained", "pass", "median error", "worst ratio", "mean ratio", "tensors above 1.1", "below 1 / 1.1", "of")
    said = origin([found["environment"]], [found["device"]])
    model = f"{found['model']['name']}, {found['model']['weights']} weights, {found['dtype']}"
    model += f"; {found['rows']} rows of {found['context']:,} tokens"
    return grid(head, rows) + f"\n\nRatio: a tensor's error over that of the ordinary pass; the mean is geometric. {model}; {said}."


def _passes(run: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    tensors, trained = str(run["tensors"]), run["adapter"]
    yield trained, "ordinary", f"{run['whole']['median_error']:.4f}", "1.00", "1.00", NONE, NONE, tensors
    streamed = [(f"streamed, {_layout(line['layout'])}", line) for line in run["streamed"]]
    for name, line in [*((name, run[key]) for key, name in YARDSTICKS.items()), *streamed]:
        ratios = f"{line['worst_ratio']:.2f}", f"{line['mean_ratio']:.2f}", str(line["tensors_above"]), str(line["tensors_below"])
        yield trained, name, f"{line['median_error']:.4f}", *ratios, tensors


def curves(folder: Path) -> str:
    """How far losses are apart, step by step."""
    path = folder / f"{CURVES}.json"
    if not path.exists():
        return missing(path.name)
    found = json.loads(path.read_text())
    rows = [
        (
            run["adapter"],
            _layout(run["streamed"]["layout"]),
            f"{run['max_difference']:.4f}",
            f"{run['limits']['max_difference']:.4f}",
            f"{run['mean_drift']:.5f}",
            f"{run['limits']['mean_drift']:.5f}",
            "yes" if run["within"] else "no",
        )
        for run in found["runs"]
    ]
    head = ("trained", "streamed in", "largest difference of a loss", "allowed", "mean drift", "allowed", "within")
    run = found["runs"][0]["whole"]
    said = origin([found["environment"]], [run["device"]])
    model = f"{run['model']['name']}, {run['model']['weights']} weights, {run['dtype']}"
    model += f"; {found['steps']} steps of {run['context']:,} tokens"
    return grid(head, rows) + f"\n\nNats, streamed less whole executor. {model}; {said}."


def _layout(layout: dict[str, Any]) -> str:
    words = [f"chunks of {layout['chunk']:,}", f"kept: {layout['keep']}"]
    if layout["keys_values"] == "host":
        words.append("keys and values on the host")
    if layout["weights"] == "streamed":
        words.append("weights streamed")
    return ", ".join(words)
