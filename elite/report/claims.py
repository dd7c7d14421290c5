"""The table of claimed contexts, from `claims.json` (elite.bench.claims)."""

import json
from pathlib import Path
from typing import Any

from elite.plan.words import duration, gib
from elite.report.markdown import grid, missing

CLAIMS = (
    ("512K on 8 GB", "rtx2060s", "tier8"),
    ("1M on 8 GB", "rtx2060s", "tier9"),
    ("2M on 24 GB", "rtx3090", "tier10"),
    ("4M on 24 GB", "rtx3090", "tier11"),
)
"""What the forerunner claimed: words, hardware preset, tier."""


def table(folder: Path) -> str:
    """What plans say of each claim."""
    file = folder / "claims.json"
    if not file.exists():
        return missing(file.name)
    content = json.loads(file.read_text())
    heads = ("claim", "preset", "model", "fits", "GPU GiB", "host, pinned GiB", "disk GiB", "a step", "how, or what is missing")
    rows = [_line(row) for row in content["claims"]]
    said = f"{len(content['tiers'])} plans, every preset with every tier, took {content['seconds']:.0f} s on a CPU."
    return grid(heads, rows) + f"\n\n{said}"


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    figures = (gib(row["total_bytes"]), gib(row["host_bytes"]), gib(row["disk_bytes"]))
    how = (row["with"] or row["executor"]) if row["fits"] else row["shortage"]
    plain = (figure.removesuffix(" GiB") for figure in figures)
    return (row["claim"], row["hardware"], row["model"], "yes" if row["fits"] else "no", *plain, duration(row["step_s"]), how)
