"""Checkpointed decoder layers whose recomputation leaves out the products that no gradient reads (see `unread`)."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from elite.optimizations.functions.compiled import CompiledForward
from elite.optimizations.functions.hooks import hooks_aside
from elite.optimizations.functions.unread import UnreadOutputs

FEW = 16
"""Tokens on which a layer's gradients are tried out."""
WHOLE_ROWS = frozenset({"documents", "sharing"})
"""Arguments of attention that a few tokens of a row have no use for."""

log = logging.getLogger("elite.optimizations")


class Recomputed:
    """Replaces the layers' forwards by ones that keep their input alone.

    Args:
        layers: a model's decoder layers.
        keeping: within it, a layer's input is saved from forward to backward.
    """

    def __init__(self, layers: nn.ModuleList, keeping: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self._layers, self._keeping = layers, keeping
        # A recomputation has to save what the forward saved, so only maps that do so either way.
        self._unread = UnreadOutputs(layers, plain=False)
        self._own = [vars(layer).get("forward") for layer in layers]
        self._forwards: list[Callable[..., Any]] = [layer.forward for layer in layers]
        # The instance's attribute hides the class's method, so nothing but this model changes.
        for index, layer in enumerate(layers):
            layer.forward = partial(self._run, index)

    def undo(self) -> None:
        """Give the layers their forwards back."""
        for layer, own in zip(self._layers, self._own, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own

    def left_out(self, layer: int) -> list[str]:
        """Maps of a layer whose products are left out, by name within it; known after the first forward pass."""
        return self._unread.names(layer)

    def _run(self, index: int, *args: Any, **kwargs: Any) -> Any:
        forward = self._forwards[index]
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # What a compiled layer keeps depends on what it computes, and hooks would not reach into it.
        if index == 0 and not isinstance(forward, CompiledForward):
            self._find(args, kwargs)
        first = True

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            if first:
                first = False
                return forward(*args, **kwargs)
            with self._unread.left_out(index):
                return forward(*args, **kwargs)

        # checkpoint saves its arguments under the hooks that are there and puts its own over them for what `forward` would save.
        with self._keeping():
            return checkpoint(run, *args, use_reentrant=False, **kwargs)

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0]
        few = partial(_few, hidden.shape[0], hidden.shape[1])
        given, named = tree_map_only(Tensor, few, (args, {name: value for name, value in kwargs.items() if name not in WHOLE_ROWS}))
        if kwargs.get("documents") is not None:
            named["documents"] = ((min(FEW, hidden.shape[1]),),)
        try:
            self._unread.find(lambda layer: self._gradients(layer, given, named))
        except torch.OutOfMemoryError:
            # It says nothing of the layers: the next pass, perhaps a smaller one, tries again.
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            log.warning("layers are recomputed in full, as they could not be tried on a few tokens: %s", error)
            self._unread.nothing()

    def _gradients(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor | None]:
        """Gradients of one layer on the first few tokens, with the same random numbers every time."""
        parameters = [p for p in self._layers[layer].parameters() if p.requires_grad]
        hidden = args[0].detach().requires_grad_()
        with hooks_aside(parameters), _aside(hidden.device), torch.enable_grad():
            out = self._forwards[layer](hidden, *args[1:], **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
            return list(torch.autograd.grad(out, [hidden, *parameters], upstream, allow_unused=True))


def _few(rows: int, tokens: int, t: Tensor) -> Tensor:
    """The part of a layer's argument that belongs to the first row's first tokens, whichever of its dimensions these are."""
    of_tokens = [dim for dim, size in enumerate(t.shape) if size == tokens and (dim > 0 or t.dim() == 1)]
    # A mask [B, 1, S, S] has two such; elsewhere a later one has the size of a vector, which may be as many.
    for dim in of_tokens if t.dim() == 4 else of_tokens[:1]:
        t = t.narrow(dim, 0, min(FEW, tokens))
    return t[:1] if t.dim() > 1 and t.shape[0] == rows else t


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Within, random numbers begin anew; afterwards they go on as if nothing had been."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield
