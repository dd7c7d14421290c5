"""`metrics.jsonl`: a line a step, and a line a validation."""

import json
from pathlib import Path
from typing import Any, TextIO


class MetricsFile:
    """Appends to `path`. A run that went back to a checkpoint takes steps again: their lines replace those of the first time.

    Args:
        resumed_step: lines of later steps were written by steps that will be taken again; they are dropped.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path, self._last = path, resumed_step
        self._file = self._opened()

    def step(self, record: dict[str, float]) -> None:
        if record["step"] <= self._last:
            self._file.close()
            self._last = int(record["step"]) - 1
            self._file = self._opened()
        self._last = int(record["step"])
        self._file.write(json.dumps(record) + "\n")

    def validation(self, record: dict[str, float]) -> None:
        self._file.write(json.dumps(record) + "\n")

    def end(self, summary: dict[str, Any]) -> None:
        self._file.close()

    def _opened(self) -> TextIO:
        """The file without the lines behind the last step."""
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _complete(line) and json.loads(line)["step"] <= self._last]
            # At no moment, wherever the process may be killed, are the kept lines missing.
            written = self._path.with_suffix(".partial")
            written.write_text("".join(f"{line}\n" for line in kept))
            written.rename(self._path)
        return self._path.open("a", buffering=1)


def read(path: Path) -> list[dict[str, float]]:
    """All complete lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines() if _complete(line)]


def _complete(line: str) -> bool:
    # A killed process may leave half a line behind.
    return line.startswith("{") and line.endswith("}")
