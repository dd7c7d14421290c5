"""A drawing of plans against measurements, as SVG without a library: peaks of memory on the left, step time on the right.

Each mark is one configuration; on the line the plan was right, above it too much was planned. Both axes are logarithms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

from elite.facts import GIB
from elite.report.calibration import QUANTITIES, Row, outcomes, rows
from elite.report.markdown import origin
from elite.report.plot import style, text

WIDTH, HEIGHT = 880, 500
SIDE = 340
LEFTS = (75, 505)
TOP = 90
COLOURS = {
    "allocated": ("#0969da", "#58a6ff"),
    "reserved": ("#bc4c00", "#f0883e"),
    "device": ("#8250df", "#bc8cff"),
    "step time": ("#1a7f37", "#3fb950"),
}
"""Quantities that are drawn, each on a light and on a dark page."""
MEMORY = ("allocated", "reserved", "device")

Points = Sequence[tuple[float, float]]
"""Measured and planned."""


def drawn(content: dict[str, Any]) -> str:
    """The whole drawing."""
    found = rows(content)
    memory = {name: points(found, name, GIB) for name in MEMORY}
    time = {"step time": points(found, "step time", 1)}
    said = f"{outcomes(found)}; {origin([content['environment']], [content['device']])}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            "<title>Planned against measured peaks of memory and step times</title>",
            f"<style>{_style()}</style>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
            *_legend({name: made for name, made in (memory | time).items() if made}),
            *Panel(LEFTS[0], "peak memory, GiB", memory).drawn(),
            *Panel(LEFTS[1], "step time, s", time).drawn(),
            text(LEFTS[0], HEIGHT - 14, said, "small"),
            "</svg>\n",
        ]
    )


def points(found: Sequence[Row], name: str, unit: float) -> Points:
    """Of the configurations of which both are known."""
    planned, taken = QUANTITIES[name]
    pairs = [(row.measured.get(taken), row.predicted.get(planned)) for row in found]
    return [(real / unit, expected / unit) for real, expected in pairs if real and expected]


@dataclass(frozen=True)
class Panel:
    """One square, with the same logarithm on both axes."""

    left: float
    title: str
    series: dict[str, Points]

    @property
    def bounds(self) -> tuple[int, int]:
        """Powers of ten around everything."""
        values = [value for made in self.series.values() for pair in made for value in pair] or [1.0]
        low, high = floor(log10(min(values))), ceil(log10(max(values)))
        return low, max(high, low + 1)

    def part(self, value: float) -> float:
        """Of the axis, from 0 to 1."""
        low, high = self.bounds
        return (log10(value) - low) / (high - low)

    def place(self, real: float, expected: float) -> tuple[float, float]:
        """Pixels of a point."""
        return self.left + SIDE * self.part(real), TOP + SIDE * (1 - self.part(expected))

    def drawn(self) -> list[str]:
        """Its elements."""
        right, bottom = self.left + SIDE, TOP + SIDE
        lines = [text(self.left, TOP - 14, f"{self.title}: planned (up) against measured")]
        low, high = self.bounds
        for power in range(low, high + 1):
            x, y = self.place(10.0**power, 10.0**power)
            lines.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
            lines.append(f'<line class="grid" x1="{self.left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            lines += [text(x, bottom + 18, f"{10.0**power:g}", "middle small"), text(self.left - 8, y + 4, f"{10.0**power:g}", "end small")]
        lines.append(f'<line class="even" x1="{self.left}" y1="{bottom}" x2="{right}" y2="{TOP}"/>')
        for name, made in self.series.items():
            lines += [mark(name, *self.place(*pair)) for pair in made]
        return lines


def mark(name: str, x: float, y: float) -> str:
    """Shapes differ as well as colours."""
    kind = f'class="mark {name.replace(" ", "-")}"'
    if name == "reserved":
        return f'<rect {kind} x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"/>'
    if name == "device":
        return f'<polygon {kind} points="{x:.1f},{y - 4.5:.1f} {x + 4.5:.1f},{y + 3.5:.1f} {x - 4.5:.1f},{y + 3.5:.1f}"/>'
    return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _legend(series: dict[str, Points]) -> list[str]:
    lines = []
    for i, name in enumerate(series):
        x = LEFTS[0] + 130 * i
        lines += [mark(name, x + 5, 34), text(x + 16, 38, name)]
    return lines


def _style() -> str:
    def coloured(which: int, even: str) -> str:
        rules = [f".mark.{name.replace(' ', '-')} {{ fill: {pair[which]}; fill-opacity: 0.7 }}" for name, pair in COLOURS.items()]
        return "\n".join([f".even {{ stroke: {even}; stroke-width: 1.5 }}", *rules])

    return style(coloured(0, "#6e7781"), coloured(1, "#8b949e"))
