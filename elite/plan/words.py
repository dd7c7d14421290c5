"""Numbers with their units, for people."""

from elite.facts import GIB


def gib(value: float) -> str:
    """Bytes as GiB."""
    return f"{value / GIB:,.2f} GiB"


def amount(value: float) -> str:
    """Bytes as GiB, or as MiB where they are few."""
    return gib(value) if value >= GIB / 10 else f"{value / 2**20:,.2f} MiB"


def count(value: float) -> str:
    """A count with three digits: 2.78 B."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"


def operations(value: float) -> str:
    """Floating-point operations."""
    for scale, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}FLOP"
    return f"{value / 1e9:.3g} GFLOP"


def duration(seconds: float) -> str:
    """Seconds in the unit people would use."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.1f} days"
