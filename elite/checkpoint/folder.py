"""Writing, finding, reading and deleting the checkpoints of a run."""

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from elite.checkpoint import manifest
from elite.checkpoint.disk import SLACK_BYTES, require_room, unsaved, why
from elite.checkpoint.tree import Tensors, flatten, unflatten
from elite.durable import sync
from elite.errors import CheckpointError

log = logging.getLogger("elite.checkpoint")

NAME = re.compile(r"step_(\d+)(\.old)?")
"""`.old`: the one that is being replaced, until the new one has its name."""


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint is to hold, in host memory: training may go on while it is written."""

    step: int
    val_loss: float | None
    """In nats; None if the step was not validated."""
    save_model: Callable[[Path], None]
    """Writes what is trained into the folder it is given, from a copy."""
    text: str
    """The state tree without its tensors, as JSON."""
    tensors: Tensors
    need: int
    """Bytes that it takes on disk, rather more than less."""


def snapshot(
    step: int, save_model: Callable[[Path], None], state: dict[str, Any], model_bytes: int = 0, val_loss: float | None = None
) -> Snapshot:
    """Copy a run's state.

    Args:
        save_model: writes what is trained into the folder it is given.
        state: a tree of dictionaries, lists, tensors and plain values.
        model_bytes: what `save_model` writes.
        val_loss: of this step, in nats.
    """
    tensors: Tensors = {}
    text = json.dumps(flatten(state, tensors))
    need = model_bytes + sum(tensor.nbytes for tensor in tensors.values()) + len(text) + SLACK_BYTES
    return Snapshot(step, val_loss, save_model, text, tensors, need)


def write(folder: Path, what: Snapshot) -> Path:
    """Write a checkpoint under `folder`; it has its name when it is complete and on the disk, and not before.

    Raises:
        Unsaved: the disk does not take it. Nothing is left of it, and what was there before is as it was.
    """
    partial = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        require_room(folder, what.need)
        partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
        what.save_model(partial / "model")
        (partial / "state.json").write_text(what.text)
        save_file(what.tensors, partial / "state.safetensors")
        manifest.seal(partial, what.step, what.val_loss)
        return _put(partial, folder / f"step_{what.step:06d}")
    except (OSError, SafetensorError) as error:
        reason = why(error)
        if reason is None:
            raise
        if partial != folder:
            # Before the room that is left is counted.
            shutil.rmtree(partial, ignore_errors=True)
        raise unsaved(what.step, folder, what.need, reason) from error


def _put(partial: Path, target: Path) -> Path:
    """Give a complete checkpoint its name. At every moment there is a valid one of that step, if there was one before."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    old = target.with_name(f"{target.name}.old")
    if target.exists():
        if old.exists() and fault(target):
            _delete(target)
        else:
            if old.exists():
                _delete(old)
            target.rename(old)
    partial.rename(target)
    sync(target.parent)
    return target


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state tree of a checkpoint."""
    state = unflatten(json.loads((checkpoint / "state.json").read_text()), load_file(checkpoint / "state.safetensors"))
    assert isinstance(state, dict)
    return state


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    found = NAME.fullmatch(checkpoint.name)
    assert found is not None
    return int(found[1])


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints under `folder`, valid or not, the newest last."""
    found = [path for path in folder.glob("step_*") if NAME.fullmatch(path.name) and path.is_dir()]
    # One that was being replaced when the process died comes before what replaces it.
    return sorted(found, key=lambda path: (step_of(path), path.suffix == ""))


def fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in words; empty if it is valid.

    Raises:
        CheckpointError: it was written by a later version, which this one cannot judge.
    """
    return manifest.fault(checkpoint, step_of(checkpoint))


def latest(folder: Path) -> Path | None:
    """The newest intact checkpoint under `folder`; damaged ones are passed over, and said.

    Raises:
        CheckpointError: one was written by a later version.
    """
    passed_over = False
    for checkpoint in reversed(checkpoints(folder)):
        wrong = fault(checkpoint)
        if not wrong:
            if passed_over:
                log.warning("checkpoint %s is intact and used instead", checkpoint.name)
            return checkpoint
        log.warning("checkpoint %s is damaged or incomplete (%s); trying the one before", checkpoint.name, wrong)
        passed_over = True
    return None


def require_latest(folder: Path) -> Path:
    """Like `latest`, where one must exist.

    Raises:
        CheckpointError: there is none.
    """
    checkpoint = latest(folder)
    if checkpoint is None:
        raise CheckpointError(f"no intact checkpoint under {folder}", "resume=never starts anew")
    return checkpoint


def losses(folder: Path) -> dict[int, float | None]:
    """Validation losses by step of the checkpoints under `folder`, as far as their manifests can be read."""
    found: dict[int, float | None] = {}
    for checkpoint in checkpoints(folder):
        try:
            found[step_of(checkpoint)] = manifest.read(checkpoint).val_loss
        except (manifest.Damaged, OSError):
            continue
    return found


def prune(folder: Path, keep_steps: set[int]) -> None:
    """Delete the checkpoints of other steps, and what a killed or replaced save left behind. What cannot be deleted is said, and stays."""
    stays = {step: path for path in checkpoints(folder) if (step := step_of(path)) in keep_steps}
    for path in set(checkpoints(folder)) - set(stays.values()):
        try:
            _delete(path)
        except OSError as error:
            _said(path, error)
    _sweep(folder)


def _delete(path: Path) -> None:
    # First it loses its name, at once: half a checkpoint must not look like one.
    doomed = path.with_name(f".deleted-{path.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _sweep(folder: Path) -> None:
    """Clear away what a killed save, or a deletion that failed, left."""
    for path in [*folder.glob(".partial-*"), *folder.glob(".deleted-*")]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            _said(path, error)


def _said(path: Path, error: OSError) -> None:
    log.warning("%s cannot be deleted (%s); tried again at the next save", path, error.strerror or error)
