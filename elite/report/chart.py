"""Drawings for reports, as SVG without a library: lines over a run, and bars of bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

from elite.facts import GIB
from elite.report.plot import style, text

WIDTH, HEIGHT = 520, 270
LEFT, TOP, RIGHT, BOTTOM = 62, 46, 14, 38
"""Margins around the axes, in pixels."""
COLOURS = (("#0969da", "#58a6ff"), ("#bc4c00", "#f0883e"), ("#1a7f37", "#3fb950"), ("#8250df", "#bc8cff"), ("#6e7781", "#8b949e"))
"""On a light and on a dark page, in the order in which series are given."""
BAR, GAP = 22, 14

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Round marks around values."""

    ticks: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], at_most: int = 5) -> "Axis":
        """Marks from below the least to above the largest value."""
        low, high = min(values), max(values)
        if high - low <= abs(high) * 1e-9:
            low, high = low - (abs(low) or 1.0) * 0.05, high + (abs(high) or 1.0) * 0.05
        power = 10.0 ** floor(log10((high - low) / at_most))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * at_most >= high - low)
        return cls(tuple(step * i for i in range(floor(low / step), ceil(high / step) + 1)))

    def part(self, value: float) -> float:
        """Of the axis, from 0 to 1."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


def lines(title: str, along: str, series: Mapping[str, Points]) -> str:
    """A chart of the series that have points; empty if none has.

    Args:
        along: what the horizontal axis is.
    """
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return ""
    across = Axis.of([x for points in drawn.values() for x, _ in points])
    up = Axis.of([y for points in drawn.values() for _, y in points])
    made = [text(LEFT, 18, title), text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, along, "middle small")]
    for tick in up.ticks:
        y = _y(up, tick)
        made.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        made.append(text(LEFT - 6, y + 4, _short(tick), "end small"))
    made += [text(_x(across, tick), HEIGHT - BOTTOM + 15, _short(tick), "middle small") for tick in across.ticks]
    for i, (name, points) in enumerate(drawn.items()):
        places = [(_x(across, x), _y(up, y)) for x, y in points]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        made.append(f'<polyline class="line s{i}" points="{joined}"/>')
        if len(places) <= 40:
            made += [f'<circle class="mark s{i}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
        if len(drawn) > 1:
            left = LEFT + 112 * i
            made += [f'<line class="line s{i}" x1="{left}" y1="33" x2="{left + 16}" y2="33"/>', text(left + 21, 37, name, "small")]
    return _svg(WIDTH, HEIGHT, title, made)


def bars(title: str, stacks: Mapping[str, Mapping[str, float]]) -> str:
    """Bars of bytes, one below the other, each of parts from the left; a part's name shows where the pointer rests."""
    longest = max((sum(parts.values()) for parts in stacks.values()), default=0.0)
    if not longest:
        return ""
    # About seven pixels a letter.
    width, left, top = 2 * WIDTH - 20, min(480, 24 + 7.2 * max(map(len, stacks))), 34
    scale = (width - left - 100) / longest
    made = [text(8, 18, title)]
    for row, (name, parts) in enumerate(stacks.items()):
        y, x = top + row * (BAR + GAP), float(left)
        made.append(text(left - 8, y + BAR - 6, name, "end"))
        for i, (part, value) in enumerate(parts.items()):
            tip = f"<title>{escape(part)}: {value / GIB:.3f} GiB</title>"
            made.append(
                f'<rect class="bar s{i % len(COLOURS)}" x="{x:.1f}" y="{y}" width="{value * scale:.1f}" height="{BAR}">{tip}</rect>'
            )
            x += value * scale
        made.append(text(x + 6, y + BAR - 6, f"{sum(parts.values()) / GIB:,.2f} GiB", "small"))
    return _svg(width, top + len(stacks) * (BAR + GAP), title, made)


def _svg(width: float, height: float, title: str, elements: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" viewBox="0 0 {width:g} {height:g}" role="img">'
    return "\n".join(
        [
            f"<figure>{head}<title>{escape(title)}</title><style>{_style()}</style>",
            f'<rect class="page" width="{width:g}" height="{height:g}"/>',
            *elements,
            "</svg></figure>",
        ]
    )


def _x(axis: Axis, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * axis.part(value)


def _y(axis: Axis, value: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - axis.part(value))


def _short(value: float) -> str:
    """12.5K for 12,500; what is tiny in powers of ten."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.4g}"


def _style() -> str:
    def coloured(which: int) -> str:
        rules = [
            f".line.s{i} {{ stroke: {pair[which]} }} .mark.s{i}, .bar.s{i} {{ fill: {pair[which]} }}" for i, pair in enumerate(COLOURS)
        ]
        return "\n".join([".line { fill: none; stroke-width: 1.8 }", *rules])

    return style(coloured(0), coloured(1))
