"""Weights that ranks divide (optimizations.zero_3): whole while a layer's chunks are at work, and let go after them.

DeepSpeed keeps the parts and takes gradients to them (elite/distributed/zero.py); its own hooks, which gather a module's weights whenever
it is called, would do so for every chunk and are not there. All ranks gather the same layers in the same order, however many chunks each
of them has.

A parameter that is let go is empty, also for autograd, which asks for its shape in the forward pass already. So what autograd sees of the
trained parameters is one number, and a layer's gradients are handed over once they are whole, while the layer still is.

Source: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from elite.errors import ModelError
from elite.executor.streamed.stem import Stem
from elite.executor.streamed.weights import Weights


def are_divided(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether DeepSpeed holds these in parts."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def whole(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Within, these are whole on all ranks; those that are already stay so after it."""
    import deepspeed

    parts = [parameter for parameter in parameters if parameter.numel() == 0]
    return deepspeed.zero.GatheredParameters(parts) if parts else nullcontext()


class DividedWeights(Weights):
    """See the module's docstring.

    Args:
        parameters: of the whole model.
        stem: what stands around its layers.
        device: where it computes.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], stem: Stem, device: torch.device) -> None:
        self._layers = [list(layer.parameters()) for layer in stem.layers]
        inner = {id(parameter) for layer in self._layers for parameter in layer}
        outer = [parameter for parameter in parameters if id(parameter) not in inner]
        self._before, self._after = ([p for p in outer if id(p) not in stem.alone(other)] for other in (stem.head, stem.embedding))
        self._seen = torch.zeros((), device=device, requires_grad=True)
        """By autograd, in place of parameters."""
        self._waiting: dict[int, Tensor] = {}
        """Gradients that others of the same pass are to be added to, by their parameter."""
        self._at_work: int | None = None
        """The layer that is whole now."""
        self._held = ExitStack()

    @contextmanager
    def use(self, layer: int, following: int | None) -> Iterator[None]:
        """Within, this layer's weights are whole, and after it, if the following sweep is of the same layer."""
        if self._at_work != layer:
            self._let_go()
            self._held.enter_context(whole(self._layers[layer]))
            self._at_work = layer
        try:
            yield
        finally:
            if following != layer:
                self._let_go()

    def before_layers(self) -> AbstractContextManager[Any]:
        """Within, what stands before the layers is whole."""
        return whole(self._before)

    def after_layers(self) -> AbstractContextManager[Any]:
        """Within, what stands after the layers is whole."""
        return whole(self._after)

    def on_demand(self) -> AbstractContextManager[Any]:
        """Refused.

        Raises:
            ModelError: always.
        """
        raise ModelError("each rank has a part of the weights alone, and a pass without labels is one rank's", "pass labels, on all ranks")

    def inputs(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """One number, which has no gradient."""
        return [self._seen] if parameters else []

    def take(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], later: Collection[nn.Parameter] = ()
    ) -> list[Tensor | None]:
        """Hand gradients over to the engine, by the parameters' own hooks; zeros where this rank found none, as others may have."""
        awaited = {id(parameter) for parameter in later}
        for parameter, found in zip(parameters, gradients, strict=True):
            known = self._waiting.pop(id(parameter), None)
            gradient = found if known is None or found is None else found.add_(known)
            gradient = known if gradient is None else gradient
            if id(parameter) not in awaited:
                torch.autograd.backward(parameter, torch.zeros_like(parameter) if gradient is None else gradient)
            elif gradient is not None:
                self._waiting[id(parameter)] = gradient
        return [None] * len(self.inputs(parameters))

    def refresh(self) -> None:
        """Let go of what a pass that was abandoned has left."""
        self._let_go()
        self._waiting.clear()

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether ranks divide it."""
        return are_divided([parameter])

    def _let_go(self) -> None:
        self._held.close()
        self._at_work = None
