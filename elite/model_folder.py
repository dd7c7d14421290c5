"""What of a model folder may be read. A folder is data: from the hub, an archive, a colleague.

Weights are read from safetensors (or GGUF) alone, for a pickle is a program; code that the folder names runs only with
`model.trust_remote_code=true`; and whatever is broken in it is an error in words, before a library trips over it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from elite.errors import ModelError
from elite.jsonfile import read_object

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
"""Weights that are unpickled when they are read, which runs what they say."""
CONVERT = "convert them to safetensors on a machine you can lose: save_pretrained(FOLDER), then model.path=FOLDER"
ANEW = "download the model folder anew, or model.path= of another"
CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
"""Fields of a configuration that name code of the folder's own, or allow it."""
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
"""Fields that may name a kernel on the hub (`owner/name`), which is code too."""
LIMITS = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 40,
    "num_local_experts": 1 << 14,
    "num_experts": 1 << 14,
}
"""Largest sizes of a model, some sixteen times beyond what exists: a larger one is a slip, and would be built before it fails."""


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        ModelError: it is none, or cannot be read.
    """
    return read_object(file, ModelError, ANEW)


def check_config(folder: Path, trusted: bool) -> None:
    """Refuse a `config.json` that is broken, names code, or is larger than any model.

    Raises:
        ModelError: it is so.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} holds no config.json", "give the folder that save_pretrained wrote, or a hub snapshot")
    found = read_config(file)
    check_code(str(file), found, trusted)
    for name, value in _fields(found):
        if name in LIMITS and isinstance(value, int | float):
            check_size(f"{file}: {name}", value, LIMITS[name])


def check_size(name: str, value: float, largest: int) -> None:
    """Refuse a size that no model has.

    Raises:
        ModelError: it is not positive, or larger than the largest.
    """
    if not 0 < value <= largest:
        rule = "must be positive" if value <= 0 else f"must be at most {largest:,}"
        raise ModelError(f"{name}={value}: {rule}", "choose a model (model=phi2), or state its whole geometry")


def check_tokenizer(folder: Path, trusted: bool) -> None:
    """Refuse tokenizer files that are broken or name code.

    Raises:
        ModelError: they do.
    """
    for name in ("tokenizer_config.json", "tokenizer.json"):
        if (folder / name).is_file():
            found = read_config(folder / name)
            if name == "tokenizer_config.json":
                check_code(str(folder / name), found, trusted)


def check_code(where: str, found: dict[str, Any], trusted: bool) -> None:
    """Refuse fields of a configuration that name code.

    Raises:
        ModelError: one does, and it is not trusted.
    """
    for name, value in _fields(found):
        kernel = name in KERNEL_KEYS and isinstance(value, str) and "/" in value
        if (name in CODE_KEYS or kernel) and not trusted:
            raise ModelError(
                f"{where} names code to be run ({name}), and code of a model folder is not run",
                "read that code, then model.trust_remote_code=true; or choose an architecture that transformers has",
            )


def _fields(node: Any) -> Iterator[tuple[str, Any]]:
    """Names and values at every depth; JSON's own reader has bounded it."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield str(name), value
            yield from _fields(value)
    elif isinstance(node, list):
        for value in node:
            yield from _fields(value)


def missing_weights(folder: Path) -> str:
    """What a model folder lacks of its weights: nothing (empty), a shard that its index names, or safetensors altogether.

    Raises:
        ModelError: the index is broken, or names files outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return "" if any(folder.glob("*.safetensors")) else "*.safetensors"
    shards = read_config(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files", ANEW)
    for shard in shards.values():
        if PurePosixPath(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index} names {shard}, which is no safetensors file of this folder", ANEW)
    return ", ".join(sorted(shard for shard in set(shards.values()) if not (folder / shard).is_file()))


def check_weights(folder: Path, named: str) -> None:
    """Refuse a folder without whole safetensors files; of each its header is read, which says how long the file is.

    Args:
        named: how the user asked for it.

    Raises:
        ModelError: weights are missing, pickled, cut off or damaged.
    """
    from safetensors import SafetensorError, safe_open

    missing = missing_weights(folder)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if missing and pickles:
        raise ModelError(f"{named} holds its weights as a pickle ({', '.join(pickles[:3])}), which could run anything", CONVERT)
    if missing:
        raise ModelError(f"{named} lacks {missing}", "a folder as save_pretrained writes it, weights in safetensors")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is cut off or damaged: {error}", "download or save it anew") from None


@contextmanager
def readable(what: str, remedy: str) -> Iterator[None]:
    """What libraries raise over a model folder, in words. They let through whatever a wrong type or a missing field leads to.

    Args:
        what: the folder or file, and what it should be.

    Raises:
        ModelError: something of that kind.
    """
    import struct

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    kinds = (OSError, ImportError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
    try:
        yield
    except (*kinds, struct.error, SafetensorError, StrictDataclassError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):
            # That says nothing about the folder.
            raise
        raise ModelError(f"{what}: {_said(error)}", remedy) from error
    except Exception as error:
        # The tokenizers library raises the base class itself.
        if type(error) is not Exception:
            raise
        raise ModelError(f"{what}: {_said(error)}", remedy) from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
