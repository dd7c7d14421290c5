"""How a run is watched over: the options of the `watchdog` group."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WatchdogConfig:
    """When a process that no longer moves is ended (elite/distributed/watchdog.py)."""

    minutes: float | None = None
    """Without a sign of life; 0 waits for ever. Unset: 30, or the time of five planned steps where that is longer."""
