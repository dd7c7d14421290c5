"""Decoder layers whose forward is compiled, and what torch says of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from elite.optimizations.torch_compile import DOCUMENTS


class CompiledForward:
    """A layer's compiled forward."""

    def __init__(self, layer: nn.Module, forward: Callable[..., Any], backend: str) -> None:
        self._attentions = [module for module in layer.modules() if hasattr(module, "is_causal")]
        self._eager = forward
        # Adapted maps that compute for their siblings keep state between calls, which is not to be traced.
        self._opaque = [module for module in layer.modules() if hasattr(module, "output_unread")]
        self._traced = [module.forward for module in self._opaque]
        for module in self._opaque:
            module.forward = torch.compiler.disable(module.forward)
        self._compiled = torch.compile(forward, backend=backend)

    def __call__(self, *args: Any, documents: Any = None, **kwargs: Any) -> Any:
        if documents is None:
            # Generation, whose cache grows with each token.
            return self._eager(*args, **kwargs)
        for attention in self._attentions:
            setattr(attention, DOCUMENTS, documents)
        return self._compiled(*args, **kwargs)

    def forget(self) -> None:
        """Leave nothing behind in the layer."""
        for attention in self._attentions:
            attention.__dict__.pop(DOCUMENTS, None)
        for module, forward in zip(self._opaque, self._traced, strict=True):
            module.forward = forward


class CompiledLayers:
    """Replaces the layers' forwards by compiled ones."""

    def __init__(self, layers: nn.ModuleList, backend: str) -> None:
        self._layers = layers
        self._own = [vars(layer).get("forward") for layer in layers]
        self._forwards = [CompiledForward(layer, layer.forward, backend) for layer in layers]
        self._before = _counts()
        for layer, forward in zip(layers, self._forwards, strict=True):
            layer.forward = forward

    def undo(self) -> None:
        """Give the layers their forwards back."""
        for layer, own, forward in zip(self._layers, self._own, self._forwards, strict=True):
            forward.forget()
            del layer.forward
            if own is not None:
                layer.forward = own

    def words(self) -> str:
        """What has been compiled so far."""
        now = _counts()
        graphs, breaks, again = (now[name] - self._before[name] for name in ("graphs", "breaks", "recompilations"))
        return f"{graphs} graphs, {breaks} graph breaks, {again} recompilations"


def _counts() -> dict[str, int]:
    """What torch has counted in this process."""
    # Seconds to import, for a run that compiles alone.
    from torch._dynamo.convert_frame import FRAME_COMPILE_COUNTER
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "recompilations": sum(FRAME_COMPILE_COUNTER.values()) - len(FRAME_COMPILE_COUNTER),
    }
