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

    A run that went back to a checkpoint takes steps again: their lines replace those of the first time.

    Args:
        resumed_step: lines of later steps were written by steps that will be taken again; they are dropped.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path, self._last = path, resumed_step
        self._waiting: list[bytes] = []
        self._taken = 0
        """Bytes of the first line that waits which are in the file already."""
        self._full = False
        _drop_later(path, resumed_step)
        # Without a buffer of its own the file says how much of a line it took.
        self._file = path.open("ab", buffering=0)

    def step(self, record: dict[str, float]) -> None:
        if record["step"] <= self._last:
            self._go_back(int(record["step"]) - 1)
        self._last = int(record["step"])
        self._append(record)

    def validation(self, record: dict[str, float]) -> None:
        self._append(record)

    def end(self, summary: dict[str, Any]) -> None:
        self._flush()
        self._file.close()
        if self._waiting:
            log.error("the last %d lines of %s are lost: the disk is full", len(self._waiting), self._path)

    def _go_back(self, step: int) -> None:
        self._file.close()
        # Half a line in the file goes with the later ones; here it is whole.
        _drop_later(self._path, step)
        self._waiting = [line for line in self._waiting if json.loads(line)["step"] <= step]
        self._taken = 0
        self._file = self._path.open("ab", buffering=0)

    def _append(self, record: dict[str, float]) -> None:
        self._waiting.append(json.dumps(record).encode() + b"\n")
        self._flush()

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._taken += self._file.write(self._waiting[0][self._taken :])
                if self._taken == len(self._waiting[0]):
                    self._waiting, self._taken = self._waiting[1:], 0
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
    if not path.exists():
        return
    content = path.read_bytes()
    found = [(line, _record(line)) for line in content.splitlines()]
    kept = b"".join(line + b"\n" for line, record in found if record is not None and record["step"] <= step)
    if content.startswith(kept):
        # Needs no room, which there may not be.
        os.truncate(path, len(kept))
    else:
        write_text(path, kept.decode())


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
