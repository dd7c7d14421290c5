"""What a training step has done so far, on disk: cut off anywhere, it goes on from the layer that was at work.

A step is a window of passes, a pass a chain of *stages*: embedding, each layer forward, head, each layer backward, embedding backward.
A stage reads rows that an earlier one wrote and writes others (`rows_needed`), so it can be carried out again; what it hands to autograd,
loss and gradients, is its result. Once a stage is done, in this order:

    rows it wrote       flushed to their files           slot0, live, gradient, o0 …
    its result          written and renamed              pass0_backward_3.safetensors
    journal.json        replaced: the stage counts now

A step that goes on runs through autograd as always, and a stage that counts gives its kept result instead of working: gradients are
added up in the same order, hooks fire, the sums are those of the undisturbed step, bit for bit.

A journal belongs to one step: its number, its weights, its batches, its layout, its program (`Key`). What belongs to another, or is not
byte for byte what was written, is dropped.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from elite.durable import sync
from elite.executor.contract import StepCut
from elite.executor.streamed.files import fingerprint, read_json, write_json, write_tensors
from elite.executor.streamed.rows import Allocator
from elite.executor.streamed.store import rows_needed
from elite.streaming import Place

log = logging.getLogger("elite.executor")

JOURNAL = "journal.json"
EMBED, HEAD, EMBED_BACKWARD = "embed", "head", "embed_backward"
Result = Sequence[Tensor | None]


def forward_stage(layer: int) -> str:
    """Name of a layer's first sweep."""
    return f"forward_{layer}"


def backward_stage(layer: int) -> str:
    """Name of a layer's backward."""
    return f"backward_{layer}"


@dataclass(frozen=True)
class Key:
    """The step that a journal belongs to; all but the number are hashes or words."""

    step: int
    weights: str
    """Of everything that is trained, before the step."""
    batches: str
    layout: str
    program: str
    """Model, dtypes, loss scale, versions."""

    def difference(self, other: dict[str, Any]) -> str | None:
        """Name of the first part that is not `other`'s."""
        return next((name for name, value in asdict(self).items() if other.get(name) != value), None)


class Unusable(Exception):
    """A journal cannot be gone on with; the text says why."""


@dataclass
class _Entry:
    """One pass."""

    fingerprint: str
    store: dict[str, Any]
    """`Store.state`, as its last stage left it."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What is done, in order: the fingerprint of the result's file and how many values it stands for."""


class Journal:
    """See the module's docstring.

    Args:
        folder: of its own.
        rows: where the passes' rows lie, in the same folder, lasting.
        layers: of the model.
        outputs: whether attention outputs are kept.
        device: where results go.
    """

    def __init__(self, folder: Path, rows: Allocator, layers: int, outputs: bool, device: torch.device) -> None:
        self.folder, self.rows, self._layers, self._outputs, self._device = folder, rows, layers, outputs, device
        self._key: Key | None = None
        self._passes: list[_Entry] = []
        self._rows: dict[str, dict[str, Any]] = {}
        self._next = 0
        self._stopping: Callable[[], bool] = lambda: False

    def open(self, key: Key, stopping: Callable[[], bool]) -> None:
        """Go on with what is there for this step, or begin anew.

        Args:
            stopping: asked after each stage; the step is cut off there if it says so.
        """
        self._key, self._stopping, self._next = key, stopping, 0
        try:
            self._load(key)
        except FileNotFoundError:
            self._begin()
            return
        except Unusable as why:
            log.warning("step %d begins anew: what was kept of a step at work %s", key.step, why)
            self._begin()
            return
        kept = len(self._passes[-1].stages) if self._passes else 0
        log.info("step %d goes on where it was cut off: micro-batch %d, after %d of its stages", key.step, len(self._passes), kept)

    def next_pass(self, fingerprint: str) -> "Pass":
        """The next pass of the window."""
        index, self._next = self._next, self._next + 1
        if index < len(self._passes) and self._passes[index].fingerprint != fingerprint:
            log.warning("micro-batch %d begins anew: what was kept of it is of other tokens or random numbers", index + 1)
            del self._passes[index:]
        if index >= len(self._passes):
            # The rows hold one pass at a time.
            self._rows = {}
        return Pass(self, index, fingerprint)

    def entry(self, index: int) -> _Entry | None:
        """What is kept of a pass."""
        return self._passes[index] if index < len(self._passes) else None

    def load(self, index: int, stage: str) -> list[Tensor | None]:
        """The result of a stage that counts."""
        count = self._passes[index].stages[stage]["count"]
        tensors = load_file(self._result(index, stage), str(self._device)) if count else {}
        return [tensors.get(str(i)) for i in range(count)]

    def commit(self, index: int, fingerprint_: str, stage: str, result: Result, store: dict[str, Any]) -> None:
        """Make a stage count.

        Raises:
            StepCut: it was asked to stop; everything so far is kept.
        """
        for name, rows in self.rows.settled():
            sync(self.folder / name)
            self._rows[name] = fingerprint(self.folder / name, rows.storage.numel()) | {"row_bytes": rows.row_bytes}
        there = {str(i): tensor for i, tensor in enumerate(result) if tensor is not None}
        file = write_tensors(self._result(index, stage), there) if result else {}
        if index == len(self._passes):
            self._passes.append(_Entry(fingerprint_, store))
        self._passes[index].store = store
        self._passes[index].stages[stage] = {"count": len(result), **file}
        assert self._key is not None
        written = {"key": asdict(self._key), "passes": [asdict(entry) for entry in self._passes], "rows": self._rows}
        write_json(self.folder / JOURNAL, written)
        if self._stopping():
            raise StepCut(self._key.step)

    def remove(self) -> None:
        """Delete everything; nobody may hold rows of it any more."""
        self.rows.release()
        if self.folder.is_dir():
            # First: without it the other files mean nothing.
            (self.folder / JOURNAL).unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def _begin(self) -> None:
        self.remove()
        self.folder.mkdir(parents=True)
        self._passes, self._rows = [], {}

    def _result(self, index: int, stage: str) -> Path:
        return self.folder / f"pass{index}_{stage}.safetensors"

    def _load(self, key: Key) -> None:
        """Take over what is there.

        Raises:
            FileNotFoundError: nothing is.
            Unusable: it belongs elsewhere, or is damaged.
        """
        try:
            found = read_json(self.folder / JOURNAL)
            other, passes, rows = found["key"], [_Entry(**entry) for entry in found["passes"]], found["rows"]
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unusable("is damaged (journal.json)") from error
        if (part := key.difference(other)) is not None:
            raise Unusable(f"is of step {other.get('step')}" if part == "step" else f"is of other {part}")
        for index, entry in enumerate(passes):
            for stage, file in entry.stages.items():
                if file["count"]:
                    self._verify(self._result(index, stage), file)
        needed = _needed(passes[-1], self._layers, self._outputs) if passes else []
        for name in needed:
            if name not in rows:
                raise Unusable(f"is incomplete ({name})")
            self._verify(self.folder / name, rows[name])
        self._passes, self._rows = passes, {name: rows[name] for name in needed}
        for name, file in self._rows.items():
            self.rows.rows(name, Place.disk, file["bytes"] // file["row_bytes"], file["row_bytes"])

    def _verify(self, path: Path, known: dict[str, Any]) -> None:
        try:
            made = fingerprint(path, known["bytes"])
        except OSError as error:
            raise Unusable(f"is incomplete ({path.name})") from error
        if any(known[name] != value for name, value in made.items()):
            raise Unusable(f"is damaged ({path.name})")


class Pass:
    """One pass of the step at work, as far as it is kept."""

    def __init__(self, journal: Journal, index: int, fingerprint: str) -> None:
        self._journal, self._index, self._fingerprint = journal, index, fingerprint

    @property
    def rows(self) -> Allocator:
        """Where its rows lie."""
        return self._journal.rows

    @property
    def store(self) -> dict[str, Any] | None:
        """`Store.state` of what is kept; None if nothing is."""
        entry = self._journal.entry(self._index)
        return None if entry is None else entry.store

    def known(self, stage: str) -> list[Tensor | None] | None:
        """The result of a stage that is done; None if it is not."""
        entry = self._journal.entry(self._index)
        return None if entry is None or stage not in entry.stages else self._journal.load(self._index, stage)

    def keep(self, stage: str, result: Result, store: dict[str, Any]) -> None:
        """Note that a stage is done.

        Raises:
            StepCut: it was the last one for now.
        """
        self._journal.commit(self._index, self._fingerprint, stage, result, store)


def _needed(entry: _Entry, layers: int, outputs: bool) -> list[str]:
    forward = sum(stage in entry.stages for stage in map(forward_stage, range(layers)))
    descended = None
    if HEAD in entry.stages:
        descended = min((layer for layer in range(layers) if backward_stage(layer) in entry.stages), default=layers)
    return [] if EMBED_BACKWARD in entry.stages else rows_needed(layers, forward, descended, outputs)
