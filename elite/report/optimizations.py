"""Every optimization, as a table of the documentation: what `ALL` and the presets say."""

from pathlib import Path

from elite.compose import from_overrides
from elite.optimizations import ALL
from elite.report.markdown import grid

PRESETS = ("standard", "extreme")
HEAD = ("row", "`optimizations.NAME`", "what", "class", "acts on", "in preset", "source")


def table(_folder: Path) -> str:
    """One line each, in the order in which they act."""
    presets = {name: from_overrides(f"optimizations={name}").config.optimizations for name in PRESETS}
    rows = []
    for kind in ALL:
        # The smaller preset is part of the larger one.
        within = next((name for name in PRESETS if getattr(presets[name], kind.name).enabled), "–")
        rows.append((str(kind.row), f"`{kind.name}`", kind.title, kind.exactness.value, kind.stage.value, within, kind.source))
    return grid(HEAD, rows)
