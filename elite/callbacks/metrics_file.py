"""`metrics.jsonl`: a line a step, and a line a validation."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from elite.checkpoint import write_text

log = logging.getLogger("elite.metrics")


class MetricsFile:
    """Appends to `path`. Lines that a full disk does not take wait in memory, and are written with the first one that it takes again.

    Args:
        resumed_step: lines of later steps were written by steps that will be taken again; they are dropped.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        self._waiting = b""
        self._full = False
        if path.exists():
            _drop_later(path, resumed_step)
        # Without a buffer of its own the file says how much of a line it took.
        self._file = path.open("ab", buffering=0)

    def step(self, record: dict[str, float]) -> None:
        self._append(record)

    def validation(self, record: dict[str, float]) -> None:
        self._append(record)

    def end(self, summary: dict[str, Any]) -> None:
        self._flush()
        self._file.close()
        if self._waiting:
            log.error("the last %d lines of %s are lost: the disk is full", self._waiting.count(b"\n"), self._path)

    def _append(self, record: dict[str, float]) -> None:
        self._waiting += json.dumps(record).encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._full:
                log.warning("%s takes no more lines (%s): they wait in memory; free space there", self._path, error.strerror)
            self._full = True
            return
        if self._full:
            log.info("%s has the lines that waited", self._path)
        self._full = False


def _drop_later(path: Path, step: int) -> None:
    """Keep whole lines up to `step`."""
    text = path.read_text()
    kept = "".join(f"{line}\n" for line in text.splitlines() if _complete(line) and json.loads(line)["step"] <= step)
    if text.startswith(kept):
        # Needs no room, which there may not be.
        os.truncate(path, len(kept.encode()))
    else:
        write_text(path, kept)


def read(path: Path) -> list[dict[str, float]]:
    """All complete lines of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines() if _complete(line)]


def _complete(line: str) -> bool:
    # A killed process may leave half a line behind.
    return line.startswith("{") and line.endswith("}")
