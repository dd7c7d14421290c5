"""Exact causal attention of one chunk: its own square, and the keys before it in blocks, merged by log-sum-exp.

The forward keeps O and its log-sum-exp L. The backward takes the merged O and L and goes over the keys block by block; a chunk's
own keys get what later chunks have added to them besides, so that the layer's projections see their whole gradient.

Shapes: n query tokens of the chunk, H query heads, K key/value heads, D head dimension; q and o [n, H, D], k and v [n, K, D],
L [H, n] in fp32.

Source: Dao 2023, arXiv:2307.08691 (merging partial results by L); Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from elite.attention import window_of
from elite.chunks import Chunk
from elite.errors import ModelError
from elite.executor.streamed.kernels import AttentionShape, Kernel, group_sum, merge
from elite.executor.streamed.keys_values import Block, KeyValues, Sink

STREAMED = "elite_streamed"


class Phase(Enum):
    """What a layer is called for."""

    forward = "forward"
    refill = "refill"
    """Only until its keys and values are known."""
    backward = "backward"
    project = "project"
    """Only until its queries, keys and values are known, which other ranks attend with."""
    finish = "finish"
    """Forward, with the output that all ranks' attention has made."""
    above = "above"
    """Backward from its output down to its attention's."""
    below = "below"
    """Backward from its queries, keys and values down to its input."""


ACROSS = frozenset({Phase.project, Phase.finish, Phase.above, Phase.below})
"""A layer of a sequence that ranks share (rounds.py)."""


class KeysKnown(Exception):
    """Ends a layer's forward in the phases `refill`, `project` and `below`."""


@dataclass
class Work:
    """What the attention of one layer needs to know about the chunk it is called for."""

    phase: Phase
    chunk: Chunk
    keys_values: KeyValues
    choose: Callable[[AttentionShape], Kernel]
    """The kernel for a shape of attention."""
    kept: tuple[Tensor, Tensor] | None = None
    """O and L of the forward pass, where they were kept."""
    made: tuple[Tensor, Tensor] | None = None
    """O and L as computed."""
    keys: tuple[Tensor, Tensor] | None = None
    """The chunk's keys and values as computed."""
    projected: tuple[Tensor, Tensor, Tensor] | None = None
    """Across ranks: the chunk's queries, keys and values as computed."""
    scale: float = 1.0
    """Across ranks: of the scores."""
    leaf: Tensor | None = None
    """In the phase `above`: the attention's output [n, H, D], where the gradient ends."""


@dataclass(frozen=True)
class _Call:
    """One call of a layer's attention."""

    work: Work
    kernel: Kernel
    window: int | None
    """Keys a query sees, itself included; None if all."""
    scale: float


def _attend(call: _Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    chunk, kernel, window, scale = call.work.chunk, call.kernel, call.window, call.scale
    if not chunk.shares:
        documents = zip(*(t.split(chunk.documents) for t in (q, k, v)), strict=True)
        parts = [kernel.forward(dq, dk, dv, True, window, scale) for dq, dk, dv in documents]
        return parts[0] if len(parts) == 1 else (torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts], dim=1))
    if window is not None or (kernel.reaches_back and call.work.keys_values.on_device):
        first = 0 if window is None else _first_seen(chunk, window)
        block = call.work.keys_values.view(first, chunk.offset + chunk.length)
        return kernel.forward(q, block.k, block.v, True, window, scale)
    o, lse = kernel.forward(q, k, v, True, None, scale)
    keys_values = call.work.keys_values
    if not keys_values.on_device:
        # Many parts: wide until the last one is there, so that what is merged is rounded once.
        o = o.to(lse.dtype)
    for block in keys_values.prefix(chunk.offset):
        o, lse = merge(o, lse, *kernel.forward(q, block.k, block.v, False, None, scale))
    return o.to(q.dtype), lse


def _first_seen(chunk: Chunk, window: int) -> int:
    return max(0, chunk.offset - window + 1)


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        work = call.work
        o, lse = work.made = work.kept or _attend(call, q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.call = call
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        # o leads to this node, and the node by its call to o: a circle that would hold the chunk's tensors until Python looks for it.
        del ctx.call
        if not call.work.chunk.shares:
            gradients = _whole_documents(call, do, *ctx.saved_tensors)
        elif call.window is not None:
            gradients = _windowed(call, do, *ctx.saved_tensors)
        else:
            gradients = _blockwise(call, do, *ctx.saved_tensors)
        return (*(g.to(t.dtype) for g, t in zip(gradients, ctx.saved_tensors, strict=False)), None)


Gradients = tuple[Tensor, Tensor, Tensor]


def _whole_documents(call: _Call, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> Gradients:
    lengths = call.work.chunk.documents
    of_each = [t.split(lengths) for t in (do, q, k, v, o)]
    logs = [part.contiguous() for part in lse.split(lengths, dim=1)]
    parts = [
        call.kernel.backward(a, b, c, d, e, log, True, call.window, call.scale) for a, b, c, d, e, log in zip(*of_each, logs, strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    dq, dk, dv = (torch.cat([part[i] for part in parts]) for i in range(3))
    return dq, dk, dv


def _windowed(call: _Call, do: Tensor, q: Tensor, _k: Tensor, _v: Tensor, o: Tensor, lse: Tensor) -> Gradients:
    """The keys in reach are one view: gradients before the chunk are added there, those of its own are handed out."""
    assert call.window is not None
    chunk, keys_values = call.work.chunk, call.work.keys_values
    first, stop = _first_seen(chunk, call.window), chunk.offset + chunk.length
    block = keys_values.view(first, stop)
    dq, dk, dv = call.kernel.backward(do, q, block.k, block.v, o, lse, True, call.window, call.scale)
    before = chunk.offset - first
    if keys_values.untouched:
        # Chunks reach back less than to the beginning: not every key gets something from the last of them.
        keys_values.zero()
    for part, sink in keys_values.gradients(first, chunk.offset):
        sink.add(dk[part.first - first : part.stop - first], dv[part.first - first : part.stop - first])
    own = keys_values.own(chunk)
    assert own is not None
    return dq, dk[before:] + own[0], dv[before:] + own[1]


def _blockwise(call: _Call, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> Gradients:
    chunk, keys_values = call.work.chunk, call.work.keys_values
    dq, dk, dv = call.kernel.backward_by_head(do, q, k, v, o, lse, True, None, call.scale)
    later = keys_values.own(chunk) or (None, None)
    # Rounded once, after both are added.
    dk, dv = (group_sum(more, k.shape[1], base, torch.empty_like(k)) for more, base in zip((dk, dv), later, strict=True))
    if chunk.offset:
        dq = dq.float()
        for block, sink in keys_values.gradients(0, chunk.offset):
            dq += _over_block(call, do, q, block, sink, o, lse)
    return dq, dk, dv


def _over_block(call: _Call, do: Tensor, q: Tensor, block: Block, sink: Sink, o: Tensor, lse: Tensor) -> Tensor:
    """dq from one block; nothing else outlives the call, so that only one block's gradients exist at a time."""
    dq, dk, dv = call.kernel.backward_by_head(do, q, block.k, block.v, o, lse, False, None, call.scale)
    sink.add(dk, dv)
    return dq


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    work: Work,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_unused: Any,  # transformers hands every attention function position ids, cache arguments and more
) -> tuple[Tensor, None]:
    """As transformers calls it: query [1, H, n, D], key and value [1, K, n, D] → [1, n, H, D]."""
    if softcap is not None or s_aux is not None or dropout:
        raise ModelError(
            f"{type(module).__name__}: soft-capped scores, attention sinks and attention dropout cannot be streamed", "executor=whole"
        )
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    q, k, v = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))
    # A window that reaches over whole documents is none, and more kernels serve.
    window = window_of(module, sliding_window)
    window = window if window is not None and window < work.chunk.longest else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if work.phase in ACROSS:
        return _across(work, q, k, v, window, scale), None
    if work.chunk.shares and work.phase is not Phase.backward:
        work.keys_values.put(work.chunk, k, v)
    work.keys = (k, v)
    if work.phase is Phase.refill:
        raise KeysKnown
    kernel = work.choose(AttentionShape(q.shape[1], k.shape[1], q.shape[2], dtype, window))
    return _ChunkAttention.apply(q, k, v, _Call(work, kernel, window, scale))[None], None


def _across(work: Work, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """[1, n, H, D], attended already between the ranks that share the sequence."""
    if window is not None:
        problem = f"a window of {window:,} tokens within a longer document, which ranks that share a sequence do not attend"
        raise ModelError(problem, "optimizations.ring_attention.enabled=false")
    work.projected, work.scale = (q, k, v), scale
    if work.phase in (Phase.project, Phase.below):
        raise KeysKnown
    assert work.kept is not None
    work.made, o = work.kept, work.kept[0]
    if work.phase is Phase.above:
        o = work.leaf = o.detach().requires_grad_()
    return o[None]


# No mask is registered under this name, and so transformers makes none: causality and document borders follow from the chunk. Making one
# would also look for packed documents, and wait for the device.
AttentionInterface.register(STREAMED, _attention)
