"""`metrics.jsonl`: a line a step, and a line a validation."""

import json
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends to `path`.

    Args:
        resumed_step: lines of later steps were written by steps that will be taken again; they are dropped.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _complete(line) and json.loads(line)["step"] <= resumed_step]
            path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def step(self, record: dict[str, float]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def validation(self, record: dict[str, float]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def end(self, summary: dict[str, Any]) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, float]]:
    """All complete lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines() if _complete(line)]


def _complete(line: str) -> bool:
    # A killed process may leave half a line behind.
    return line.startswith("{") and line.endswith("}")
