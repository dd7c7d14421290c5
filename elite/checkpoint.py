"""Checkpoints: atomic, verified, without pickles.

A checkpoint is a folder `step_NNNNNN/` with `model/` (what is trained, in the library's own format), `state.safetensors` and
`state.json` (everything else: optimizer, schedule, scaler, random states, data position, counters), and `manifest.json` with
the size and hash of every file, written last. It appears under its name only when complete.
"""

import hashlib
import json
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from elite.errors import CheckpointError

log = logging.getLogger("elite.checkpoint")

MANIFEST = "manifest.json"
Tensors = dict[str, torch.Tensor]


def flatten(tree: Any, tensors: Tensors) -> Any:
    """`tree` with every tensor replaced by a reference into `tensors`, fit for JSON.

    Dictionaries become lists of pairs, because JSON turns the integer keys of optimizer states into strings.

    Raises:
        TypeError: a leaf is neither a tensor nor a JSON value.
    """
    if isinstance(tree, torch.Tensor):
        name = str(len(tensors))
        # Shared storage is refused by safetensors, and a checkpoint must not keep device memory alive.
        tensors[name] = tree.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[flatten(key, tensors), flatten(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return {"tuple" if isinstance(tree, tuple) else "list": [flatten(value, tensors) for value in tree]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"a checkpoint cannot hold a {type(tree).__name__}")


def unflatten(node: Any, tensors: Tensors) -> Any:
    """What `flatten` was given."""
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in value}
    items = [unflatten(v, tensors) for v in value]
    return tuple(items) if kind == "tuple" else items


def random_state() -> dict[str, Any]:
    """States of every random generator this process uses."""
    version, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (version, torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state["python"])
    version, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def save(folder: Path, step: int, save_model: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Write a checkpoint of `step` under `folder`.

    Args:
        save_model: writes what is trained into the folder it is given.
        state: a tree of dictionaries, lists, tensors and plain values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step_{step:06d}"
    partial = Path(tempfile.mkdtemp(dir=folder, prefix=".partial-"))
    save_model(partial / "model")
    tensors: Tensors = {}
    (partial / "state.json").write_text(json.dumps(flatten(state, tensors)))
    save_file(tensors, partial / "state.safetensors")
    manifest = {str(path.relative_to(partial)): _fingerprint(path) for path in sorted(partial.rglob("*")) if path.is_file()}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _sync(folder)
    return target


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state tree of a checkpoint."""
    state = unflatten(json.loads((checkpoint / "state.json").read_text()), load_file(checkpoint / "state.safetensors"))
    assert isinstance(state, dict)
    return state


def is_valid(checkpoint: Path) -> bool:
    """Whether every file is as the manifest says."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        return all(_fingerprint(checkpoint / name) == expected for name, expected in manifest.items())
    except (OSError, ValueError):
        return False


def latest(folder: Path) -> Path | None:
    """The newest intact checkpoint under `folder`; damaged ones are passed over, and said."""
    for checkpoint in sorted(folder.glob("step_*"), reverse=True):
        if is_valid(checkpoint):
            return checkpoint
        log.warning("checkpoint %s is damaged or incomplete; trying the one before", checkpoint.name)
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


def prune(folder: Path, keep_steps: set[int]) -> None:
    """Delete the checkpoints of other steps, and what a killed save left behind."""
    names = {f"step_{step:06d}" for step in keep_steps}
    for path in [*folder.glob("step_*"), *folder.glob(".partial-*")]:
        if path.name not in names:
            shutil.rmtree(path)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
