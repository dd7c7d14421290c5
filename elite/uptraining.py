"""What up-training a converted model reports: the loss of the model that was loaded, of the converted one, and at the end."""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from elite import pretrained
from elite.config import AdapterMethod
from elite.data.batches import Batch
from elite.errors import CheckpointError
from elite.executor.build import build, streams_weights
from elite.jsonfile import read_object
from elite.model import load
from elite.optimizations.gqa_conversion import GQAConversion
from elite.optimizations.ring_attention import active_variant
from elite.prepared import Run
from elite.training.loop import Progress
from elite.training.validation import Validator


def uptrains(run: Run) -> bool:
    """Whether the run trains what a conversion has changed."""
    return run.config.adapter.method is AdapterMethod.converted


def losses_before(run: Run, with_context: Sequence[Batch], alone: Sequence[Batch]) -> dict[str, float]:
    """Validation losses of the model as it is without its conversion, measured once a run.

    Args:
        with_context, alone: held-out targets, as `Validator` takes them.
    """
    file = run.folder.path / "before_conversion.json"
    if file.is_file():
        known: dict[str, float] = read_object(file, CheckpointError, f"delete it: {file.name} is measured anew")
        return known
    decisions = tuple(d for d in run.decisions if d.name != GQAConversion.name)
    # Random weights are drawn as they will be for the run itself.
    torch.manual_seed(run.config.seed)
    loaded = load(run.config, decisions, run.dtype, run.ranks.device, streams_weights(run.layout))
    shared = active_variant(run.decisions)
    executors = build(loaded, run.layout, run.dtype, run.device, run.ranks, Path(run.config.output.cache).expanduser(), shared)
    found = Validator(executors.validation, with_context, alone, run.ranks, sharing=executors.sharing)()
    if run.ranks.is_main:
        file.write_text(json.dumps(found, indent=2))
    del loaded, executors
    gc.collect()
    if run.ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.ranks.device)
    torch.manual_seed(run.config.seed)
    return found


def with_tokenizer(run: Run, folder: Path) -> None:
    """Leave the tokenizer beside an exported model, so that `model.path=` takes the folder as it is."""
    tokenizer = pretrained.tokenizer(run.config.model, Path(run.config.output.cache).expanduser(), download=False)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def reported(before: dict[str, float], progress: Progress) -> dict[str, Any]:
    """The summary's part about it."""
    return {"conversion": {"before": before, "after": progress.first_val, "uptrained": progress.last_val}}


def words(summary: dict[str, Any]) -> str:
    """A line for the terminal; empty for other runs."""
    if "conversion" not in summary:
        return ""
    before, after, last = (summary["conversion"][when]["val_loss"] for when in ("before", "after", "uptrained"))
    return f"conversion   validation loss {before:.4f} as loaded, {after:.4f} converted, {last:.4f} up-trained\n"
