"""`metrics.jsonl`: a line a step, and a line a validation."""

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger("elite.metrics")


class MetricsFile:
    """Appends to `path`.

    Args:
        resumed_step: lines of later steps were written by steps that will be taken again; they are dropped.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        if path.exists():
            kept = [record for record in read(path) if record["step"] <= resumed_step]
            path.write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        self._file = path.open("a", buffering=1)

    def step(self, record: dict[str, float]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def validation(self, record: dict[str, float]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def end(self, summary: dict[str, Any]) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, float]]:
    """All whole lines of a metrics file; how many are not is said."""
    lines = path.read_bytes().splitlines()
    found = [record for line in lines if (record := _record(line)) is not None]
    if lost := len(lines) - len(found):
        log.warning("%s: %d damaged line(s) left out", path, lost)
    return found


def _record(line: bytes) -> dict[str, float] | None:
    # A killed process may leave half a line behind.
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int | float) else None
