"""What one run did, on one page: `report.html` in its folder, written at its end, or again by `python -m elite.report.run_report FOLDER`.

It reads the run folder alone, so what it says can be checked there.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from elite.callbacks import metrics_file
from elite.facts import GIB
from elite.plan.words import duration
from elite.report import chart, endings, page
from elite.report.convergence import Convergence, estimate
from elite.runfolder import RunFolder

DRAWN = 500
"""Points of a curve at most; of more, neighbours are averaged."""
PROMISE_PERCENT = 3.0
"""A GPU's memory peak is planned within so much."""

Records = Sequence[dict[str, float]]


class RunReport:
    """Observer that writes the report when the run ends, however it does."""

    def __init__(self, folder: RunFolder, plan: dict[str, Any], console: Console) -> None:
        self._folder, self._plan, self._console = folder, plan, console

    def step(self, record: dict[str, float]) -> None:
        """Nothing: the metrics file has it."""

    def validation(self, record: dict[str, float]) -> None:
        """Nothing: the metrics file has it."""

    def end(self, summary: dict[str, Any]) -> None:
        """Write it; what is wrong with a report is said and costs no run its results."""
        try:
            write(self._folder, self._plan, summary)
        except Exception as error:
            # Whatever it is: the run has ended, and its results are about to be saved.
            self._console.print(f"the report could not be written: {type(error).__name__}: {error}", markup=False)


def write(folder: RunFolder, plan: dict[str, Any], summary: dict[str, Any]) -> Path:
    """Write the report of what is in `folder`; an empty summary is that of a run that has not ended well."""
    lines = metrics_file.read(folder.metrics) if folder.metrics.is_file() else []
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "val_loss" in line]
    heading = f"{summary['name'] if summary else folder.path.name}: {plan['model']}, {plan['tier']}, {plan['context']:,} tokens"
    seen = convergence(steps)
    sections = [
        ("Result", _result(plan, summary, steps)),
        ("Warnings", page.notes(warnings(plan, summary), "bad")),
        ("Curves", _curves(steps, validations, seen)),
        ("Convergence", page.paragraph(seen.words) if steps else ""),
        ("Memory", _memory(plan, summary)),
        ("Time", _time(plan, summary)),
        ("Optimizations", _optimizations(plan, summary)),
        ("Completion of a held-out file", _completion(folder.path / "completion.json")),
        ("Not modelled", page.notes(plan["not_modelled"], "dim")),
        ("Origin", _origin(folder)),
    ]
    path = folder.path / "report.html"
    path.write_text(page.page(heading, sections))
    return path


def convergence(steps: Records) -> Convergence:
    """Where the training loss of these lines is heading."""
    return estimate([line["tokens"] for line in steps], [line["loss"] for line in steps])


def warnings(plan: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """What a reader should know before they trust the rest."""
    found = [] if summary else ["this run has not ended well: what follows is what it had done by then"]
    found += plan["warnings"]
    found += [f"{switch['name']} was requested and is inactive: {switch['reason']}" for switch in _inactive(plan)]
    off = summary["errors_percent"]["peak"] if summary and plan["device_kind"] == "cuda" else None
    if off is not None and abs(off) > PROMISE_PERCENT:
        found.append(f"the plan missed the memory peak by {off:+.1f} %")
    return found


def _inactive(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [switch for switch in plan["decisions"] if switch["requested"] and not switch["active"]]


def _result(plan: dict[str, Any], summary: dict[str, Any], steps: Records) -> str:
    rows = [
        ("device", f"{plan['device']} × {plan['ranks']}"),
        ("trained", f"{plan['adapter']}: {plan['trainable_params']:,} of {plan['total_params']:,} parameters"),
        ("executor", plan["executor"]),
        ("steps", f"{len(steps):,} of {plan['steps']:,}"),
    ]
    if summary:
        first, last = summary["val_first"], summary["val_last"]
        rows += [
            ("tokens", f"{summary['tokens']:,}"),
            ("training loss", f"{summary['train_loss_first']:.4f} → {summary['train_loss_last']:.4f}"),
            ("validation loss", f"{first['val_loss']:.4f} → {last['val_loss']:.4f}"),
            ("without the repository before it", f"{first['val_loss_alone']:.4f} → {last['val_loss_alone']:.4f}"),
            ("best validation loss", f"{summary['best_val_loss']:.4f} at step {summary['best_step']:,}"),
        ]
        rows += [(what, said) for what, _, said in (line.partition("  ") for line in endings.unusual(summary))]
    return page.table(("", ""), rows)


def _curves(steps: Records, validations: Records, seen: Convergence) -> str:
    def over(name: str, lines: Records = steps, unit: float = 1.0) -> list[tuple[float, float]]:
        return thinned([(line["tokens"], line[name] / unit) for line in lines])

    losses = {"training": over("loss"), "fit": thinned(seen.curve)}
    held_out = {"with context": over("val_loss", validations), "alone": over("val_loss_alone", validations)}
    utilisation = over("mfu") if any(line["mfu"] for line in steps) else []
    memory = {"allocated": over("gpu_peak_bytes", unit=GIB), "reserved": over("gpu_reserved_bytes", unit=GIB)}
    drawn = [
        ("training loss", losses),
        ("validation loss", held_out),
        ("learning rate", {"rate": over("lr")}),
        ("gradient norm", {"norm": over("grad_norm")}),
        ("throughput, tokens/s", {"throughput": over("tokens_per_s")}),
        ("share of the data sheet's rate (MFU)", {"mfu": utilisation}),
        ("GPU memory, GiB", memory if any(line["gpu_peak_bytes"] for line in steps) else {}),
        ("host memory of the process, GiB", {"host": over("host_rss_bytes", unit=GIB)}),
    ]
    return "\n".join(chart.lines(title, "tokens", series) for title, series in drawn)


def thinned(points: Sequence[tuple[float, float]], at_most: int = DRAWN) -> list[tuple[float, float]]:
    """The finite ones, neighbours averaged until there are few enough."""
    finite = [point for point in points if np.isfinite(point[1])]
    if not finite:
        return []
    means = [part.mean(axis=0) for part in np.array_split(np.array(finite), min(at_most, len(finite)))]
    return [(float(x), float(y)) for x, y in means]


def _memory(plan: dict[str, Any], summary: dict[str, Any]) -> str:
    parts = {name.replace("_", " "): value for name, value in plan["memory"].items() if value}
    stacks = {"planned": parts}
    rows = [("planned: " + name, f"{value / GIB:,.3f}", "", "") for name, value in sorted(parts.items(), key=lambda part: -part[1])]
    if summary:
        stacks |= {"measured": {"peak": summary["measured_peak_bytes"]}}
        for label, planned, measured, error in (
            ("peak, allocated", "predicted_peak_bytes", "measured_peak_bytes", "peak"),
            ("peak, reserved", "predicted_reserved_bytes", "reserved_peak_bytes", "reserved"),
            ("host, pinned", "predicted_host_pinned_bytes", "host_pinned_bytes", "host_pinned"),
        ):
            if summary[measured]:
                off = summary["errors_percent"][error]
                rows.append((label, _gib(summary[planned]), _gib(summary[measured]), "" if off is None else f"{off:+.1f} %"))
        rows.append(("host, the whole process", "", _gib(summary["host_rss_peak_bytes"]), ""))
    kind = "GPU" if plan["device_kind"] == "cuda" else "host"
    return chart.bars(f"Peak of {kind} memory by component", stacks) + page.table(("GiB", "planned", "measured", "plan is off by"), rows)


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value / GIB:,.3f}"


def _time(plan: dict[str, Any], summary: dict[str, Any]) -> str:
    rows = [("planned step", duration(plan["step_s"])), ("planned throughput", f"{plan['tokens_per_s']:,.0f} tokens/s")]
    if summary:
        off = summary["errors_percent"]["step"]
        rows += [
            ("measured step, median", duration(summary["step_s"]) + ("" if off is None else f" (the plan is off by {off:+.1f} %)")),
            ("measured throughput, median", f"{summary['tokens_per_s']:,.0f} tokens/s"),
            ("all steps", duration(summary["train_time_s"])),
        ]
    parts = sorted(plan["time"].items(), key=lambda part: -part[1])
    rows += [
        (f"planned: {name.replace('_', ' ')}", f"{value / plan['step_s']:.0%}") for name, value in parts if value >= plan["step_s"] / 100
    ]
    return page.table(("", ""), rows)


def _optimizations(plan: dict[str, Any], summary: dict[str, Any]) -> str:
    acts = summary["applied"] if summary else {}
    rows = []
    for switch in plan["decisions"]:
        if switch["active"]:
            said = f"acted on {acts[switch['name']]}" if switch["name"] in acts else "active"
        else:
            said = f"inactive: {switch['reason']}" if switch["requested"] else "off"
        rows.append((str(switch["row"]), switch["name"], switch["exactness"], said))
    return page.table(("row", "optimization", "exactness", "in this run"), rows)


def _completion(path: Path) -> str:
    if not path.is_file():
        return ""
    known = json.loads(path.read_text())
    made = [page.paragraph(known["path"])]
    for name in ("prompt_end", "reference", "before", "after"):
        if name in known:
            made += [page.paragraph(name.replace("_", " "), "dim"), page.quoted(known[name])]
    return "\n".join(made)


def _origin(folder: RunFolder) -> str:
    environment = json.loads(folder.environment.read_text())
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    rows = [
        ("commit", str(environment["commit"])),
        ("command", " ".join(environment["command"])),
        ("begun", environment["started"]),
        ("versions", versions),
        ("platform", f"{environment['platform']}, Python {environment['python']}"),
    ]
    return page.table(("", ""), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    run = RunFolder(parser.parse_args().folder)
    print(write(run, json.loads(run.plan.read_text()), json.loads(run.summary.read_text()) if run.finished else {}))
