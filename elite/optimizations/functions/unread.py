"""Linear maps whose output no gradient reads: a layer's recomputation leaves their products out.

A layer is computed again for the values that its gradients read. What its last maps give is only added to the residual stream, and a
sum passes its gradient on whatever its terms are; in Llama that is the MLP's output map, in Phi the attention's as well.

Which maps these are depends on the architecture and is found by trying: gradients of a layer on a few tokens are compared, bit for bit,
with those after a map's output was replaced by something else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Gradients = Callable[[int], Sequence[Tensor | None]]
"""Gradients of one layer on a few tokens, the same whenever it is called."""


class UnreadOutputs:
    """The maps of every layer whose output may be anything while it is recomputed.

    Args:
        layers: decoder layers. Layers with the same modules are taken to be alike.
        plain: also plain linear maps, whose function is replaced by one that saves other tensors; else only modules that know
            `output_unread`.
    """

    def __init__(self, layers: nn.ModuleList, plain: bool = True) -> None:
        self._layers, self._plain = layers, plain
        self._maps: list[list[Any]] | None = None
        self._known: list[int] = []

    def find(self, gradients: Gradients, at_hand: Callable[[int], AbstractContextManager[Any]] = lambda _layer: nullcontext()) -> None:
        """Try every map of one layer of each kind, unless that has been done and no module has changed since.

        Args:
            at_hand: within what it returns for a layer, its gradients can be asked for.
        """
        modules = _identities(self._layers)
        if modules == self._known:
            return
        found: dict[tuple[tuple[str, type], ...], list[str]] = {}
        maps = []
        # From the top: the lowest layers may have no backward at all.
        for index, layer in reversed(list(enumerate(self._layers))):
            kind = tuple((name, type(module)) for name, module in layer.named_modules())
            if kind not in found:
                with at_hand(index):
                    found[kind] = _unread_in(layer, self._plain, partial(gradients, index))
            maps.append([layer.get_submodule(name) for name in found[kind]])
        self._maps, self._known = maps[::-1], modules

    def nothing(self) -> None:
        """Take it that everything is read, until a module changes."""
        self._maps, self._known = None, _identities(self._layers)

    def names(self, layer: int) -> list[str]:
        """What was found in a layer, by name within it."""
        known = {id(module): name for name, module in self._layers[layer].named_modules()}
        return [] if self._maps is None else [known[id(module)] for module in self._maps[layer]]

    @contextmanager
    def left_out(self, layer: int) -> Iterator[None]:
        """Within, those maps of a layer return zeros, with the gradients of what they would have returned."""
        maps = [] if self._maps is None else self._maps[layer]
        own = [module.__dict__.get("forward") for module in maps]
        for module in maps:
            if hasattr(module, "output_unread"):
                module.output_unread = True
            else:
                module.forward = partial(_unread_linear, module)
        try:
            yield
        finally:
            for module, forward in zip(maps, own, strict=True):
                if hasattr(module, "output_unread"):
                    module.output_unread = False
                elif forward is None:
                    del module.forward
                else:
                    module.forward = forward


def _identities(layers: nn.ModuleList) -> list[int]:
    """Of all modules within. Asked for at every step, and `modules()` makes names and a set of what may be thousands."""
    found, ahead = list[int](), list[nn.Module | None]([layers])
    while ahead:
        module = ahead.pop()
        found.append(id(module))
        if module is not None:
            ahead += module._modules.values()
    return found


def _unread_in(layer: nn.Module, plain: bool, gradients: Callable[[], Sequence[Tensor | None]]) -> list[str]:
    candidates, names = _candidates(layer, plain), list[str]()
    if not candidates:
        return names
    right = gradients()
    for name, module in candidates:
        handle = module.register_forward_hook(lambda _module, _inputs, out: out + torch.linspace(1, 50, out.shape[-1]).to(out))
        try:
            changed = gradients()
        finally:
            handle.remove()
        if all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(right, changed, strict=True)):
            names.append(name)
    return names


def _candidates(layer: nn.Module, plain: bool) -> list[tuple[str, nn.Module]]:
    """Modules that leave their product out themselves when `output_unread` is set, and plain linear maps."""
    found = [(name, module) for name, module in layer.named_modules() if hasattr(module, "output_unread")]
    inside = tuple(f"{name}." for name, _ in found)
    for name, module in layer.named_modules() if plain else ():
        if type(module) is nn.Linear and "forward" not in module.__dict__ and not name.startswith(inside):
            found.append((name, module))
    return found


def _unread_linear(module: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = _UnreadLinear.apply(x, module.weight, module.bias)
    return out


class _UnreadLinear(torch.autograd.Function):
    """F.linear without its product, as autocast would run it: x [..., in], weight [out, in], bias [out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        ctx.like = x.dtype
        return x.new_zeros(*x.shape[:-1], weight.shape[0], dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = upstream[0]
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad_x = (grad @ weight.to(grad.dtype)).to(ctx.like) if wants_x else None
        rows = grad.flatten(0, -2)
        grad_weight = (rows.mT @ x.to(grad.dtype).flatten(0, -2)).to(weight.dtype) if wants_weight else None
        return grad_x, grad_weight, rows.sum(0, dtype=weight.dtype) if wants_bias else None
