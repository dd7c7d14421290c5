"""A decoder taken apart without knowing its kind: what stands before its layers, how it calls them, what stands after them.

transformers' own forward of the decoder is run on a chunk while its layers are replaced by recorders. So embedding scales,
rotary embeddings and per-layer arguments are the model's own, whatever its architecture.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elite.data.batches import IGNORE
from elite.errors import ModelError
from elite.executor.streamed.attention import STREAMED
from elite.losses import linear_cross_entropy
from elite.streaming import ARGUMENT_BYTES


@dataclass(frozen=True)
class Positions:
    """One chunk's input to the decoder."""

    index: int
    ids: Tensor
    """[1, n]"""
    positions: Tensor
    """[1, n]"""


class _Enough(Exception):
    """The last layer was reached."""


class Stem:
    """See the module's docstring.

    Args:
        core: a causal language model of transformers with its layers in `get_decoder().layers`.

    Raises:
        ModelError: it has no such layers.
    """

    def __init__(self, core: PreTrainedModel) -> None:
        self._decoder: Any = core.get_decoder()
        layers = getattr(self._decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ModelError(f"{type(core).__name__} keeps its decoder layers elsewhere than in get_decoder().layers", "executor=whole")
        self.layers = layers
        self.embedding: Any = core.get_input_embeddings()
        self.head: Any = core.get_output_embeddings()
        self._token: Tensor | None = None
        self._calls: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        self._calls_bytes = 0

    @property
    def training(self) -> bool:
        """Whether dropout would act."""
        return bool(self._decoder.training)

    def alone(self, module: nn.Module) -> set[int]:
        """Parameters, by id, that are the embedding's or the head's alone: not those of both, where these are tied."""
        both = {id(p) for p in self.embedding.parameters()} & {id(p) for p in self.head.parameters()}
        return {id(p) for p in module.parameters()} - both

    def forget(self) -> None:
        """Drop kept layer arguments: the positions have changed."""
        self._calls.clear()
        self._calls_bytes = 0

    def embed(self, chunk: Positions) -> Tensor:
        """The first layer's input [1, n, d]."""
        embedded: Tensor = self.embedding(chunk.ids)
        self._token = embedded[:, :1].detach().clone()
        return self.prologue(chunk, embedded)

    def prologue(self, chunk: Positions, embedded: Tensor) -> Tensor:
        """The first layer's input [1, n, d] from embedded tokens [1, n, d]."""
        seen: list[Tensor] = []

        def first(hidden: Tensor, **_arguments: Any) -> Tensor:
            seen.append(hidden)
            raise _Enough

        with self._replaced(first), self._until_enough():
            self._decoder(inputs_embeds=embedded, position_ids=chunk.positions, use_cache=False)
        return seen[0]

    def trains_embedding(self, chunk: Positions) -> bool:
        """Whether anything before the layers is trained. Random state is left as it was."""
        first = Positions(chunk.index, chunk.ids[:, :1], chunk.positions[:, :1])
        devices = [chunk.ids.device] if chunk.ids.is_cuda else []
        with torch.random.fork_rng(devices), torch.enable_grad(), self.streaming():
            return self.embed(first).requires_grad

    @torch.no_grad()
    def calls(self, chunk: Positions) -> list[dict[str, Any]]:
        """Keyword arguments with which the decoder calls each of its layers for this chunk."""
        if chunk.index in self._calls:
            return self._calls[chunk.index]
        recorded: list[dict[str, Any]] = []

        def record(hidden: Tensor, **arguments: Any) -> Tensor:
            recorded.append(arguments)
            if len(recorded) == len(self.layers):
                raise _Enough
            return hidden

        if self._token is None:
            self._token = self.embedding(chunk.ids[:, :1])
        # One token's stands for all: nobody reads them, and the embedding need not be at hand for the layers.
        embedded = self._token.expand(*chunk.ids.shape, -1)
        with self._replaced(record), self._until_enough():
            self._decoder(inputs_embeds=embedded, position_ids=chunk.positions, use_cache=False)
        self._keep(chunk.index, recorded)
        return recorded

    def epilogue(self, chunk: Positions, hidden: Tensor) -> Tensor:
        """What the decoder makes of its last layer's output `hidden` [1, n, d]: the final norm."""
        with self._replaced(lambda _, **_arguments: hidden):
            # What comes in is not read: its size and dtype are.
            entering = hidden.detach()
            out: Tensor = self._decoder(inputs_embeds=entering, position_ids=chunk.positions, use_cache=False).last_hidden_state
        return out

    def loss(self, chunk: Positions, hidden: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        """Sum of the token losses, fp32 scalar, of the last layer's output `hidden` [n, d] and labels [n]; `IGNORE` scores none."""
        normed = self.epilogue(chunk, hidden[None])[0]
        return linear_cross_entropy(
            *(normed, self.head.weight, self.head.bias, labels),
            ignore_index=IGNORE,
            label_smoothing=label_smoothing,
        )

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Within, layers attend by chunks, and checkpointing is off: they are recomputed anyway."""
        config = self._decoder.config
        before = config._attn_implementation
        checkpointed: list[Any] = [layer for layer in self.layers if getattr(layer, "gradient_checkpointing", False)]
        config._attn_implementation = STREAMED
        for layer in checkpointed:
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            config._attn_implementation = before
            for layer in checkpointed:
                layer.gradient_checkpointing = True

    def _keep(self, index: int, recorded: list[dict[str, Any]]) -> None:
        # Layers share most of them.
        size = sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in _tensors(recorded)}.values())
        if self._calls_bytes + size <= ARGUMENT_BYTES:
            self._calls[index] = recorded
            self._calls_bytes += size

    @contextmanager
    def _replaced(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Within, every layer's forward is `forward`."""
        hidden = [layer.__dict__.get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, own in zip(self.layers, hidden, strict=True):
                if own is None:
                    del layer.forward
                else:
                    layer.forward = own

    @contextmanager
    def _until_enough(self) -> Iterator[None]:
        try:
            yield
        except _Enough as enough:
            # Some of transformers' frames hold the exception that left them: without this, chunks would live until the collector runs.
            enough.__traceback__ = None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
