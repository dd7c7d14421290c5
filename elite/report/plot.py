"""A drawing of the comparison, as SVG without a library: peak memory and throughput of both executors by context.

It carries its own background, and colours for light and dark pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, log2, log10

from elite.facts import GIB
from elite.report.streamed import Comparison

WIDTH, HEIGHT = 880, 400
PANEL_WIDTH, PANEL_HEIGHT = 350, 220
LEFTS = (70, 500)
TOP = 95
MARGIN = 18
"""Pixels between a panel's edge and its first and last context."""


def style(light: str, dark: str) -> str:
    """Rules of a drawing for light and dark pages, with those that all drawings share."""
    return f"""
text {{ font: 13px system-ui, sans-serif; fill: #24292f }} .small {{ font-size: 11px }}
.middle {{ text-anchor: middle }} .end {{ text-anchor: end }}
.page {{ fill: #ffffff }} .grid {{ stroke: #d0d7de }} {light}
@media (prefers-color-scheme: dark) {{
text {{ fill: #e6edf3 }} .page {{ fill: #0d1117 }} .grid {{ stroke: #30363d }}
{dark}
}}
"""


STYLE = style(
    """.line { fill: none; stroke-width: 2.5 }
.line.recipe { stroke: #bc4c00 } .line.streamed { stroke: #0969da }
.line.floor { stroke: #6e7781; stroke-width: 1.5; stroke-dasharray: 5 4 }
.mark.recipe { fill: #bc4c00 } .mark.streamed { fill: #0969da }""",
    """.line.recipe { stroke: #f0883e } .line.streamed { stroke: #58a6ff } .line.floor { stroke: #8b949e }
.mark.recipe { fill: #f0883e } .mark.streamed { fill: #58a6ff }""",
)
LEGEND = {"recipe": "the peers’ recipe", "streamed": "streamed executor", "floor": "floor: kernels alone"}
MARKED = ("recipe", "streamed")
"""What was measured, point by point."""

Points = Sequence[tuple[int, float]]
"""Tokens, and a value each."""


def drawn(found: Comparison) -> str:
    """The whole drawing."""
    reserved: dict[str, Points] = {name: [(t, run.reserved_bytes / GIB) for t, run in found.of(name).items()] for name in MARKED}
    speed: dict[str, Points] = {name: [(t, run.tokens_per_s) for t, run in found.of(name).items()] for name in MARKED}
    speed["floor"] = [(tokens, tokens / seconds) for tokens, seconds in found.floors.items()]
    contexts = sorted({run.tokens for run in found.runs})
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            "<title>Peak GPU memory and throughput by context, streamed executor and the peers’ recipe</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
            *_legend(),
            *Panel(LEFTS[0], "peak GPU memory, GiB reserved", contexts, reserved).drawn(),
            *Panel(LEFTS[1], "throughput, tokens/s", contexts, speed).drawn(),
            text(LEFTS[0], HEIGHT - 18, found.origin, "small"),
            "</svg>\n",
        ]
    )


@dataclass(frozen=True)
class Panel:
    """One pair of axes: contexts on a binary logarithm, values from zero."""

    left: float
    title: str
    contexts: Sequence[int]
    series: dict[str, Points]

    def x(self, tokens: int) -> float:
        """Pixels from the drawing's left edge."""
        low, high = log2(self.contexts[0]), log2(self.contexts[-1])
        share = (log2(tokens) - low) / (high - low) if high > low else 0.5
        return self.left + MARGIN + share * (PANEL_WIDTH - 2 * MARGIN)

    def y(self, value: float) -> float:
        """Pixels from the drawing's upper edge."""
        return TOP + PANEL_HEIGHT * (1 - value / self.ticks[-1])

    @property
    def ticks(self) -> list[float]:
        """Round values from zero to just above the highest."""
        highest = max(value for points in self.series.values() for _, value in points)
        power = 10 ** int(log10(highest / 5) // 1)
        step = next(step for factor in (1, 2, 5, 10) if (step := factor * power) * 5 >= highest)
        return [step * i for i in range(ceil(highest / step) + 1)]

    def drawn(self) -> list[str]:
        """Its elements."""
        right, bottom = self.left + PANEL_WIDTH, TOP + PANEL_HEIGHT
        lines = [text(self.left, TOP - 16, self.title)]
        for tick in self.ticks:
            lines.append(f'<line class="grid" x1="{self.left}" y1="{self.y(tick):.1f}" x2="{right}" y2="{self.y(tick):.1f}"/>')
            lines.append(text(self.left - 8, self.y(tick) + 4, f"{tick:,g}", "end small"))
        lines += [text(self.x(tokens), bottom + 18, _tokens(tokens), "middle small") for tokens in self.contexts]
        lines.append(text(self.left + PANEL_WIDTH / 2, bottom + 40, "context, tokens (log₂ scale)", "middle"))
        for name, points in self.series.items():
            places = [(self.x(tokens), self.y(value)) for tokens, value in sorted(points)]
            lines.append(f'<polyline class="line {name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
            lines += [_mark(name, x, y) for x, y in places if name in MARKED]
        return lines


def _legend() -> list[str]:
    lines = []
    for i, (name, label) in enumerate(LEGEND.items()):
        x, y = LEFTS[0] + 190 * i, 36
        lines.append(f'<line class="line {name}" x1="{x}" y1="{y}" x2="{x + 30}" y2="{y}"/>')
        lines += [_mark(name, x + 15, y)] * (name in MARKED) + [text(x + 38, y + 4, label)]
    return lines


def _mark(name: str, x: float, y: float) -> str:
    """Shapes differ as well as colours."""
    if name == "recipe":
        return f'<rect class="mark {name}" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    return f'<circle class="mark {name}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'


def text(x: float, y: float, said: str, kind: str = "") -> str:
    """A label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(said)}</text>'


def _tokens(count: int) -> str:
    """32K for 32,768."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if count >= size:
            return f"{count / size:g}{unit}"
    return str(count)
