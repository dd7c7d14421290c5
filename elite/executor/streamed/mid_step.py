"""Checkpoints within a step: ties the journal of a run's steps to its streamed model."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from elite import __version__
from elite.data.batches import Batch
from elite.distributed.ranks import Ranks
from elite.executor.streamed.files import raw
from elite.executor.streamed.journal import Journal, Key
from elite.executor.streamed.rows import Allocator
from elite.executor.streamed.runner import Runner
from elite.streaming import Keep


class MidStep:
    """A `StepJournal` of a streamed model.

    Args:
        runner: of the model; its layout has `journal`.
        core: the model itself.
        folder: of the run; each rank keeps its own progress in it.
    """

    def __init__(self, runner: Runner, core: PreTrainedModel, folder: Path, ranks: Ranks) -> None:
        self._runner, self._core, self._folder, self._ranks = runner, core, folder, ranks
        own = folder / f"rank{ranks.rank}"
        rows = Allocator(runner.device, own, lasting=True)
        self._journal = Journal(own, rows, len(runner.layers), runner.layout.keep is Keep.attention, runner.device)

    def begin(self, step: int, window: Sequence[Batch], scale: float, stopping: Callable[[], bool]) -> None:
        """See `StepJournal`."""
        # Files of passes outside steps, which took the same names, would take the room that this one needs.
        self._runner.forget()
        self._runner.allocator.release_disk()
        self._journal.open(self._key(step, window, scale), stopping)
        self._runner.journal = self._journal

    def end(self) -> None:
        """See `StepJournal`."""
        self._runner.journal = None
        self._runner.forget()
        self._journal.remove()
        with suppress(OSError):
            # Unless other ranks' are still in it.
            self._folder.rmdir()

    def _key(self, step: int, window: Sequence[Batch], scale: float) -> Key:
        batches = hashlib.sha256()
        for batch in window:
            batches.update(repr((batch.documents, batch.input_ids.shape)).encode())
            for tensor in (batch.input_ids, batch.labels, batch.position_ids):
                batches.update(raw(tensor))
        # Where files lie changes nothing.
        layout = replace(self._runner.layout, folder=None).to_dict()
        weights = hashlib.sha256()
        for name, parameter in self._core.named_parameters():
            if parameter.requires_grad:
                weights.update(name.encode())
                weights.update(raw(parameter))
        of_program = (
            self._core.config.to_json_string(),
            scale,
            self._ranks.world,
            torch.__version__,
            transformers.__version__,
            __version__,
        )
        program = hashlib.sha256(repr(of_program).encode()).hexdigest()
        return Key(step, weights.hexdigest(), batches.hexdigest(), repr(sorted(layout.items())), program)
