"""Checkpoints: atomic, verified, without pickles.

A checkpoint is a folder `step_NNNNNN/` with `model/` (what is trained, in the library's own format), `state.safetensors` and
`state.json` (everything else: optimizer, schedule, scaler, random states, data position, counters), and `manifest.json` with
the size and hash of every file, written last. It appears under its name only when complete.

    tree.py      a tree of tensors and plain values as JSON and safetensors   manifest.py  what belongs to a checkpoint, what is wrong
    randoms.py   the states of random generators                              disk.py      files whole or not there; full disks
    folder.py    writing, finding, reading and deleting checkpoints
"""

from elite.checkpoint.disk import Unsaved, disk_trouble, write_folder, write_text
from elite.checkpoint.folder import Snapshot, checkpoints, fault, latest, load_state, losses, prune, require_latest, snapshot, write
from elite.checkpoint.manifest import MANIFEST
from elite.checkpoint.randoms import random_state, set_random_state
from elite.checkpoint.tree import Tensors, flatten, unflatten

__all__ = [
    "MANIFEST",
    "Snapshot",
    "Tensors",
    "Unsaved",
    "checkpoints",
    "disk_trouble",
    "fault",
    "flatten",
    "latest",
    "load_state",
    "losses",
    "prune",
    "random_state",
    "require_latest",
    "set_random_state",
    "snapshot",
    "unflatten",
    "write",
    "write_folder",
    "write_text",
]
