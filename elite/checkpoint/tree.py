"""A tree of dictionaries, lists, tensors and plain values as JSON and a table of tensors."""

from typing import Any

import torch

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
        tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
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
