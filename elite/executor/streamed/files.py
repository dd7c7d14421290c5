"""Files that are on the disk when a function returns, whole or not at all, and whether they still are what was written."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from elite.durable import put

DIGEST_BYTES = 2**24
"""Read at once."""


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, for hashing."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def fingerprint(path: Path, size: int | None = None) -> dict[str, Any]:
    """Size and hash of a file, or of its first `size` bytes. Raises OSError if it cannot be read."""
    left, digest = path.stat().st_size if size is None else size, hashlib.sha256()
    found = 0
    with path.open("rb") as file:
        while found < left and (data := file.read(min(DIGEST_BYTES, left - found))):
            digest.update(data)
            found += len(data)
    return {"bytes": found, "sha256": digest.hexdigest()}


def write_json(path: Path, value: Any) -> None:
    """Plain JSON types with their own hash, in place of what was there."""
    text = json.dumps(value)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}))
    put(partial, path)


def read_json(path: Path) -> Any:
    """What `write_json` was given.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what was written.
    """
    outer = json.loads(path.read_bytes())
    if not (isinstance(outer, dict) and isinstance(text := outer.get("content"), str)):
        raise ValueError("no content")
    if hashlib.sha256(text.encode()).hexdigest() != outer.get("sha256"):
        raise ValueError("another hash")
    return json.loads(text)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors in place of what was there; the file's fingerprint."""
    partial = path.with_suffix(".partial")
    # Copies of their own: safetensors refuses storage that two of them share.
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, partial)
    made = fingerprint(partial)
    put(partial, path)
    return made
