"""A drawing of a learning-rate range test, as SVG without a library: loss over the rate's logarithm, and the rates it suggests."""

from math import ceil, floor, log10

from elite.report.plot import style, text
from elite.training.lr_range import Sweep

WIDTH, HEIGHT = 880, 420
LEFT, RIGHT, TOP, BOTTOM = 80, 850, 80, 350
TICKS = 5
STYLE = style(
    """.raw { fill: none; stroke: #8c959f; stroke-width: 1 } .smooth { fill: none; stroke: #0969da; stroke-width: 2.5 }
.steepest { stroke: #bc4c00; stroke-dasharray: 5 4 } .valley { stroke: #1a7f37; stroke-width: 1.5 }""",
    """.raw { stroke: #6e7681 } .smooth { stroke: #58a6ff } .steepest { stroke: #f0883e } .valley { stroke: #3fb950 }""",
)


def drawn(found: Sweep, said: str) -> str:
    """The whole drawing.

    Args:
        said: what was tested, for the bottom line.
    """
    low, high = floor(log10(found.rates[0])), ceil(log10(found.rates[-1]))
    # What diverges would leave the rest of the curve flat.
    least, most = min(found.corrected), max(max(found.smoothed), found.corrected[0])
    most = most if most > least else least + 1

    def x(rate: float) -> float:
        return LEFT + (RIGHT - LEFT) * (log10(rate) - low) / max(1, high - low)

    def y(loss: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (min(loss, most) - least) / (most - least)

    lines = [text(LEFT, TOP - 16, "training loss, nats a token, as if all batches were as hard")]
    for power in range(low, max(high, low + 1) + 1):
        place = x(10.0**power)
        lines.append(f'<line class="grid" x1="{place:.1f}" y1="{TOP}" x2="{place:.1f}" y2="{BOTTOM}"/>')
        lines.append(text(place, BOTTOM + 18, f"{10.0**power:g}", "middle small"))
    for tick in (least + (most - least) * i / TICKS for i in range(TICKS + 1)):
        lines.append(f'<line class="grid" x1="{LEFT}" y1="{y(tick):.1f}" x2="{RIGHT}" y2="{y(tick):.1f}"/>')
        lines.append(text(LEFT - 8, y(tick) + 4, f"{tick:.3g}", "end small"))
    for kind, losses in (("raw", found.corrected), ("smooth", found.smoothed)):
        points = " ".join(f"{x(rate):.1f},{y(loss):.1f}" for rate, loss in zip(found.rates, losses, strict=True))
        lines.append(f'<polyline class="{kind}" points="{points}"/>')
    for row, (name, rate) in enumerate((("steepest", found.steepest), ("valley", found.valley))):
        if rate is not None:
            lines.append(f'<line class="{name}" x1="{x(rate):.1f}" y1="{TOP}" x2="{x(rate):.1f}" y2="{BOTTOM}"/>')
            lines.append(text(x(rate) + 5, TOP + 14 + 16 * row, f"{name} {rate:.2g}", "small"))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            "<title>Training loss by learning rate</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
            *lines,
            text((LEFT + RIGHT) / 2, BOTTOM + 40, "learning rate (log₁₀ scale)", "middle"),
            text(LEFT, HEIGHT - 12, said, "small"),
            "</svg>\n",
        ]
    )
