"""A drawing of the kernels' comparison, as SVG without a library: everyone's time relative to ours, by operation, on a logarithm.

A mark is the median of an operation's rows, the line through it reaches from the least to the most. Left of 1× somebody is faster.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log2
from statistics import median

from elite.report.kernels import SUMMED_TOKENS, Measured, spoken
from elite.report.plot import style, text

WIDTH = 880
LEFT, RIGHT, TOP = 190, 850, 95
LINE, GAP, FOOT = 15, 12, 94
COLOURS = {
    "eager": ("#6e7781", "#8b949e"),
    "compile": ("#bc4c00", "#f0883e"),
    "Liger": ("#8250df", "#bc8cff"),
    "CCE": ("#1a7f37", "#3fb950"),
    "bitsandbytes": ("#bf3989", "#f778ba"),
}
"""On a light and on a dark page."""


@dataclass(frozen=True)
class Band:
    """One operation: least, median and most ratio of each column's fastest."""

    title: str
    spans: dict[str, tuple[float, float, float]]

    @property
    def height(self) -> float:
        """Pixels, with the gap after it."""
        return LINE * len(self.spans) + GAP


def bands(found: Measured) -> list[Band]:
    """Operations in which somebody else was measured."""
    made = []
    for op, rows in found.large.items():
        spans = {}
        for column, names in found.columns.items():
            ratios = [min(these) for row in rows if (these := row.ratios(names))]
            if ratios:
                spans[column] = (min(ratios), median(ratios), max(ratios))
        if spans:
            made.append(Band(spoken(op), spans))
    return made


def drawn(found: Measured) -> str:
    """The whole drawing."""
    shown = bands(found)
    scale = Scale.over([ratio for band in shown for span in band.spans.values() for ratio in span])
    bottom = TOP + sum(band.height for band in shown)
    height = bottom + FOOT
    lines = []
    for tick in scale.ticks:
        kind = "even" if tick == 1 else "grid"
        x = scale.x(tick)
        lines.append(f'<line class="{kind}" x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}"/>')
        lines.append(text(x, bottom + 16, f"{tick:g}×", "middle small"))
    y: float = TOP
    for band in shown:
        lines += _band(band, y, scale)
        y += band.height
    title = "Time of other implementations relative to ours, by operation"
    said = f"time relative to ours (log₂ scale): least, median and most; {SUMMED_TOKENS:,} tokens or more"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
            f"<title>{title}</title>",
            f"<style>{_style()}</style>",
            f'<rect class="page" width="{WIDTH}" height="{height:g}" rx="8"/>',
            *_legend(found.columns),
            *lines,
            text((LEFT + RIGHT) / 2, bottom + 38, said, "middle"),
            text(20, height - 32, found.origin, "small"),
            text(20, height - 16, found.libraries, "small"),
            "</svg>\n",
        ]
    )


@dataclass(frozen=True)
class Scale:
    """A binary logarithm between two powers of two, with 1 among them."""

    low: int
    high: int

    @classmethod
    def over(cls, ratios: Sequence[float]) -> "Scale":
        """Around all of them."""
        return cls(min(0, floor(log2(min(ratios, default=1)))), max(1, ceil(log2(max(ratios, default=1)))))

    @property
    def ticks(self) -> list[float]:
        """Powers of two."""
        return [2.0**power for power in range(self.low, self.high + 1)]

    def x(self, ratio: float) -> float:
        """Pixels from the drawing's left edge."""
        return LEFT + (RIGHT - LEFT) * (log2(ratio) - self.low) / (self.high - self.low)


def _band(band: Band, top: float, scale: Scale) -> list[str]:
    lines = [text(LEFT - 14, top + LINE * len(band.spans) / 2 + 4, band.title, "end")]
    for i, (column, (least, middle, most)) in enumerate(band.spans.items()):
        y = top + LINE * (i + 0.5)
        lines.append(f'<line class="line {column}" x1="{scale.x(least):.1f}" y1="{y:.1f}" x2="{scale.x(most):.1f}" y2="{y:.1f}"/>')
        lines.append(_mark(column, scale.x(middle), y))
    return lines


def _legend(columns: Iterable[str]) -> list[str]:
    lines = []
    for i, column in enumerate(columns):
        x, y = LEFT + 130 * i, 36
        lines += [f'<line class="line {column}" x1="{x}" y1="{y}" x2="{x + 30}" y2="{y}"/>', _mark(column, x + 15, y)]
        lines.append(text(x + 38, y + 4, column))
    return [*lines, text(LEFT, 66, "right of 1×: ours is faster", "small")]


def _mark(column: str, x: float, y: float) -> str:
    """Shapes differ as well as colours."""
    kind = f'class="mark {column}"'
    if column == "Liger":
        return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    offsets = {
        "eager": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "compile": ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
        "CCE": ((0, -5), (5, 4), (-5, 4)),
        "bitsandbytes": ((0, 5), (5, -4), (-5, -4)),
    }[column]
    return f'<polygon {kind} points="{" ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in offsets)}"/>'


def _style() -> str:
    def coloured(which: int, even: str) -> str:
        rules = [f".line.{name} {{ stroke: {pair[which]} }} .mark.{name} {{ fill: {pair[which]} }}" for name, pair in COLOURS.items()]
        return "\n".join([f".even {{ stroke: {even}; stroke-width: 1.5 }}", *rules])

    return style(".line { stroke-width: 2 }\n" + coloured(0, "#0969da"), coloured(1, "#58a6ff"))
