"""The jobs of a multirun as tables and a page: `ablation.md`, `ablation.json` and `ablation.html` in its folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elite.facts import GIB
from elite.jobs import State
from elite.plan.words import duration
from elite.report import chart, page
from elite.report.markdown import NONE, grid, origin, signed
from elite.report.sweep import Row

HEAD = (
    "job",
    "peak, GiB",
    "Δ",
    "reserved",
    "host",
    "tokens/s",
    "Δ",
    "step",
    "training loss",
    "validation loss",
    "Δ",
    "largest Δ of training loss",
    "plan off: peak",
    "step",
    "claimed by the forerunner",
)
FAILURES = {State.failed: "failed", State.inapplicable: "not run", State.running: "did not end"}
NOTE = (
    "Δ: against the first row of its table. Peak: allocated GPU memory, on a CPU the growth of the process. "
    "The largest difference of a step's training loss is held to the word of the weakest exactness class that differs."
)


def values(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """A job's figures by name, each None where nothing was measured; differences are those from its baseline."""
    base = next(other for other in rows if other.number == row.baseline)
    own = row.run.summary if row.run else None
    reference = base.run.summary if base.run and base.number != row.number else None
    found: dict[str, Any] = {"job": row.label, "state": row.state.value, "reason": row.reason, "claimed": row.claimed}
    for name, of in FIGURES.items():
        found[name] = of(own) if own else None
        found[f"{name}_difference"] = of(own) - of(reference) if own and reference and of(own) is not None else None
    against = row.against
    return found | {
        "executor": row.run.plan["executor"] if row.run else None,
        "differing": against.part if against else None,
        "exactness": against.exactness.value if against and against.exactness else None,
        "largest_loss_difference": against.largest if against else None,
        "mean_loss_drift": against.drift if against else None,
        "limit": against.limit if against else None,
        "drift_limit": against.drift_limit if against else None,
        "holds": against.holds if against else None,
        "plan_peak_error_percent": own["errors_percent"]["peak"] if own else None,
        "plan_step_error_percent": own["errors_percent"]["step"] if own else None,
    }


FIGURES: dict[str, Any] = {
    "peak_gib": lambda summary: summary["measured_peak_bytes"] / GIB,
    "reserved_gib": lambda summary: summary["reserved_peak_bytes"] / GIB,
    "host_gib": lambda summary: summary["host_rss_peak_bytes"] / GIB,
    "tokens_per_s": lambda summary: summary["tokens_per_s"],
    "step_s": lambda summary: summary["step_s"],
    "train_loss": lambda summary: summary["train_loss_last"],
    "val_loss": lambda summary: summary["val_last"]["val_loss"],
}
"""What is compared, by its name, out of a summary."""


def tables(rows: Sequence[Row]) -> list[list[Row]]:
    """Jobs with the same baseline, which comes first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.baseline, []).append(row)
    return [sorted(group, key=lambda row: row.number != row.baseline) for group in groups.values()]


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """A job as a line of its table."""
    if row.run is None:
        said = f"**{FAILURES[row.state]}**" + (f": {row.reason}" if row.reason else "")
        return [row.label, said, *[""] * (len(HEAD) - 3), row.claimed]
    found = values(row, rows)
    speed = None
    if found["tokens_per_s_difference"] is not None:
        speed = found["tokens_per_s_difference"] / (found["tokens_per_s"] - found["tokens_per_s_difference"]) * 100
    return [
        row.label,
        f"{found['peak_gib']:.3f}",
        signed(found["peak_gib_difference"], ".3f"),
        f"{found['reserved_gib']:.3f}" if found["reserved_gib"] else NONE,
        f"{found['host_gib']:.2f}",
        f"{found['tokens_per_s']:,.0f}",
        signed(speed, ".1f", " %"),
        duration(found["step_s"]),
        f"{found['train_loss']:.4f}",
        f"{found['val_loss']:.4f}",
        signed(found["val_loss_difference"], ".4f"),
        kept(found),
        signed(found["plan_peak_error_percent"], ".1f", " %"),
        signed(found["plan_step_error_percent"], ".1f", " %"),
        row.claimed,
    ]


def kept(found: dict[str, Any]) -> str:
    """The largest difference of the losses, and whether it is within its class's word."""
    if found["largest_loss_difference"] is None:
        return NONE
    said = f"{found['largest_loss_difference']:.2g}"
    if found["exactness"] is None:
        return said
    if found["holds"] is None:
        return f"{said}, {found['exactness']}: no limit"
    limit = f"{found['limit']:.2g}"
    if found["drift_limit"] is not None:
        said, limit = f"{said}, mean {found['mean_loss_drift']:+.2g}", f"{limit}, mean {found['drift_limit']:.2g}"
    return f"{said}, {found['exactness']} {'holds' if found['holds'] else '**does not hold**'} (limit {limit})"


def write(sweep: Path, rows: Sequence[Row]) -> None:
    """Write all three files."""
    said = _origin(sweep, rows)
    groups = [(f"Against job {group[0].number}: {group[0].label}", [cells(row, rows) for row in group]) for group in tables(rows)]
    parts = [f"## {title}\n\n{grid(HEAD, [[_inline(cell) for cell in row] for row in lines])}" for title, lines in groups]
    heading = f"Multirun {sweep.parent.name}/{sweep.name}"
    (sweep / "ablation.md").write_text("\n\n".join([f"# {heading}", *parts, NOTE, said]) + "\n")
    plain = {"environment": _environment(sweep, rows), "jobs": [row.to_dict() | {"values": values(row, rows)} for row in rows]}
    (sweep / "ablation.json").write_text(json.dumps(plain, indent=1) + "\n")
    sections = [(title, page.table(HEAD, [[cell.replace("**", "") for cell in row] for row in lines])) for title, lines in groups]
    drawn = chart.bars("Peak memory", {row.label: {"peak": row.run.summary["measured_peak_bytes"]} for row in rows if row.run})
    html = page.page(heading, [*sections, ("Memory", drawn), ("", page.paragraph(NOTE, "dim") + page.paragraph(said, "dim"))])
    (sweep / "ablation.html").write_text(html)


def _inline(cell: str) -> str:
    return cell.replace("|", "\\|")


def _environment(sweep: Path, rows: Sequence[Row]) -> dict[str, Any] | None:
    """Of the first job that ended well: all ran on one machine."""
    done = next((row.number for row in rows if row.run), None)
    found: dict[str, Any] | None = json.loads((sweep / done / "environment.json").read_text()) if done else None
    return found


def _origin(sweep: Path, rows: Sequence[Row]) -> str:
    environment = _environment(sweep, rows)
    return origin([environment], [environment["device"]["name"]]) if environment else "no job has ended well"
