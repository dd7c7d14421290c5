"""Tables of the kernels, made of `kernels.json` (elite.bench.kernels): one line a row, one line an operation, the losses of a head.

Ratios are times over ours: above 1 we are faster. Where another provider is faster, by more than two decimals show, the line says so.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from elite.report.markdown import NONE, grid, missing, origin

KERNELS = "kernels"
DEQUANTISE = "kernels_dequantise"
"""The file of weights of four bits, measured apart."""
OURS = "elite"
NAMES = {
    "eager": "eager",
    "eager_fused": "torch’s own",
    "compile": "compile",
    "liger": "Liger",
    "liger_fp32": "Liger, fp32 sums",
    "cce": "CCE",
    "cce_exact": "CCE, exact",
    "bitsandbytes": "bitsandbytes",
}
"""Other providers of a file, by their names there."""
COLUMNS = {
    "eager": ("eager", "eager_fused"),
    "compile": ("compile",),
    "Liger": ("liger", "liger_fp32"),
    "CCE": ("cce", "cce_exact"),
    "bitsandbytes": ("bitsandbytes",),
}
"""Whom a column shows, where somebody was asked; two of them as two numbers."""
PAIRS = "Two numbers: GELU as a formula and as torch’s own; Liger’s head with bf16 and with fp32 sums; CCE with and without its filter."
LOSS = "linear_cross_entropy"
SUMMED_TOKENS = 8192
"""Summaries and drawing are of rows with as many tokens at least: fewer do not fill a GPU."""
EVEN = 0.995
"""From this ratio on nobody is faster: two decimals say 1.00."""
MIB = 1024**2

Providers = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One operation on one geometry, one way."""

    op: str
    variant: str
    model: str
    tokens: int
    which: str
    """Pass: `forward` or `forward+backward`."""
    providers: Providers

    @property
    def title(self) -> str:
        """Operation and variant."""
        return spoken(self.op) + (f", {self.variant}" if self.variant else "")

    @property
    def ours_ms(self) -> float | None:
        """Median time of our kernel."""
        return self.ms(OURS)

    def ms(self, name: str) -> float | None:
        """Median time of a provider; None if it could not be measured."""
        return self.providers[name]["ms"][1] if "ms" in self.providers.get(name, {}) else None

    def ratio(self, name: str) -> float | None:
        """A provider's time over ours."""
        theirs, ours = self.ms(name), self.ours_ms
        return None if theirs is None or ours is None else theirs / ours

    def ratios(self, names: Iterable[str]) -> list[float]:
        """Of those that were measured."""
        return [ratio for name in names if (ratio := self.ratio(name)) is not None]

    @property
    def share(self) -> float | None:
        """Of a copy's bandwidth that our kernel reaches on the bytes that must move."""
        share: float | None = self.providers.get(OURS, {}).get("bandwidth_share")
        return share

    @property
    def fastest_other(self) -> tuple[str, float] | None:
        """The one with the least time, and its ratio."""
        found = {name: ratio for name in NAMES if (ratio := self.ratio(name)) is not None}
        return min(found.items(), key=lambda item: item[1]) if found else None

    @property
    def missed(self) -> bool:
        """Whether somebody else is faster."""
        return self.fastest_other is not None and self.fastest_other[1] < EVEN

    @property
    def result(self) -> str:
        """Who is fastest, in words."""
        if self.ours_ms is None:
            return "not measured"
        if self.fastest_other is None:
            return "alone"
        name, ratio = self.fastest_other
        return f"miss: {NAMES[name]} {times(ratio)}" if self.missed else "fastest"


@dataclass(frozen=True)
class Measured:
    """A whole file."""

    rows: tuple[Row, ...]
    copy_gb_s: float
    origin: str
    """Device, versions, commit."""
    libraries: str
    """Versions of those compared with."""

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Of `COLUMNS`, those that a row has anything for."""
        there = {name for row in self.rows for name in row.providers}
        return {title: names for title, names in COLUMNS.items() if there.intersection(names)}

    @property
    def large(self) -> dict[str, list[Row]]:
        """Rows of many tokens in which our kernel was measured, by operation."""
        kept = [row for row in self.rows if row.tokens >= SUMMED_TOKENS and row.ours_ms is not None]
        return {op: [row for row in kept if row.op == op] for op in dict.fromkeys(row.op for row in kept)}


def measured(folder: Path, name: str = KERNELS) -> Measured | None:
    """What a file holds; None if it is not there."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    rows = (Row(row["op"], row["variant"], row["model"], row["tokens"], row["pass"], row["providers"]) for row in found["rows"])
    libraries = [f"{name} {version}" for name, version in found["environment"]["libraries"].items() if version]
    said = origin([found["environment"]], [found["device"]])
    return Measured(tuple(rows), found["copy_gb_s"], said, ", ".join(libraries))


def every(folder: Path, name: str = KERNELS) -> str:
    """One line a row."""
    found = measured(folder, name)
    if found is None:
        return missing(f"{name}.json")
    head = ("operation", "model", "tokens", "pass", "ours ms", *found.columns, "of a copy’s bandwidth", "result")
    lines = [
        (
            *(row.title, row.model, f"{row.tokens:,}", row.which),
            NONE if row.ours_ms is None else f"{row.ours_ms:.3f}",
            *(" / ".join(map(times, row.ratios(names))) or NONE for names in found.columns.values()),
            NONE if row.share is None else f"{row.share:.0%}",
            row.result,
        )
        for row in found.rows
    ]
    pairs = any(len(row.ratios(names)) > 1 for row in found.rows for names in found.columns.values())
    said = f"{PAIRS} " if pairs else ""
    return grid(head, lines) + f"\n\nTimes over ours, medians. {said}{_said(found)}"


def summary(folder: Path) -> str:
    """One line an operation: the least and the median ratio against each column's fastest."""
    found = measured(folder)
    if found is None:
        return missing(f"{KERNELS}.json")
    lines = []
    for op, rows in found.large.items():
        against = [[min(ratios) for row in rows if (ratios := row.ratios(names))] for names in found.columns.values()]
        shares = [row.share for row in rows if row.share is not None]
        first = sum(not row.missed for row in rows)
        lines.append(
            (
                *(spoken(op), str(len(rows))),
                *(f"{times(min(ratios))} / {times(median(ratios))}" if ratios else NONE for ratios in against),
                f"{first} of {len(rows)}",
                f"{min(shares):.0%}" if shares else NONE,
            )
        )
    head = ("operation", "rows", *(f"against {name}" for name in found.columns), "fastest", "least of a copy’s bandwidth")
    said = f"Their time over ours, least / median of rows with {SUMMED_TOKENS:,} tokens or more: geometries, passes and variants."
    return grid(head, lines) + f"\n\n{said} {_said(found)}"


def losses(folder: Path) -> str:
    """Time, peak memory and error of a head's loss by provider."""
    found = measured(folder)
    if found is None:
        return missing(f"{KERNELS}.json")
    rows = [row for row in found.rows if row.op == LOSS]
    names = [name for name in (OURS, *NAMES) if any(name in row.providers for row in rows)]
    lines = [
        (row.model, f"{row.tokens:,}", f"{row.variant}, {row.which}", *(_cost(row.providers.get(name)) for name in names)) for row in rows
    ]
    said = (
        "Milliseconds, peak MiB beyond the inputs, gradients included, and relative error against fp32: of the loss, or of the gradients."
    )
    why = "; ".join(dict.fromkeys(_lost(rows)))
    head = ("model", "tokens", "head", *(NAMES.get(name, "ours") for name in names))
    return grid(head, lines) + f"\n\n{said} {_said(found)}" + (f" Not measured: {why}." if why else "")


def spoken(op: str) -> str:
    """An operation's name for people."""
    return {"swiglu": "SwiGLU", "gelu": "GELU", "lora": "LoRA"}.get(op, op.replace("_", " "))


def times(ratio: float) -> str:
    """A ratio with its sign."""
    return f"{ratio:.2f}×"


def _said(found: Measured) -> str:
    return f"bf16. A copy moves {found.copy_gb_s:,.0f} GB/s. {'; '.join(filter(None, (found.origin, found.libraries)))}."


def _cost(figures: dict[str, Any] | None) -> str:
    if figures is None or "ms" not in figures:
        return NONE
    peak, error = figures.get("peak_bytes"), figures["error"]
    cells = (f"{figures['ms'][1]:.2f}", NONE if peak is None else f"{peak / MIB:,.0f}", NONE if error is None else f"{error:.1e}")
    return " / ".join(cells)


def _lost(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        for name, figures in row.providers.items():
            if "unavailable" in figures:
                yield f"{row.model}, {NAMES.get(name, 'ours')}: {figures['unavailable'].rpartition('Error: ')[2]}"
