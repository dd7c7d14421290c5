"""Causal attention that stays inside documents, registered with transformers' AttentionInterface.

A packed sequence is attended document by document, so no mask is formed, however long it is. The caller passes
`documents=` to the model's forward: for each row the lengths of its documents, which sum to S.

Shapes: B rows, H query heads, K key/value heads (H % K == 0), S tokens, D head dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel

from elite.errors import ModelError
from elite.optimizations.sliding_window import block_of
from elite.optimizations.torch_compile import DOCUMENTS

DOCUMENT_SDPA = "elite_document_sdpa"
DOCUMENT_EAGER = "elite_document_eager"
GENERATING = "elite_generating"
WINDOW = "attention_window"
"""Attribute of an attention module: tokens that its queries see (optimizations.sliding_window)."""

Documents = tuple[tuple[int, ...], ...]


class Sharing(Protocol):
    """The ranks that share each row (elite/distributed/ring.py)."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, dropout: float, window: int | None
    ) -> Tensor:
        """Attention [B,H,n,D] of the n tokens of this rank to all ranks' keys; `documents` are those of whole rows."""


def window_of(module: nn.Module, own: int | None) -> int | None:
    """Tokens that a query of this attention sees: the model's own window, or the one that was given to it."""
    given: int | None = getattr(module, WINDOW, None)
    return own if given is None else given


def windowed(model: nn.Module) -> bool:
    """Whether any attention in it was given a window."""
    return any(hasattr(module, WINDOW) for module in model.modules())


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, keys] mask of the last queries on all keys, true where one may look: itself and the past, `window` tokens in all."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if window is None else mask.triu(keys - queries - window + 1)


@lru_cache(maxsize=2)
def _bias(queries: int, reach: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Added to the scores of a block of queries on `reach` keys before them and their own; one for all blocks and layers."""
    seen = _band(queries, reach + queries, window, device)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))


def _fused(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None) -> Tensor:
    if window is not None and window < key.shape[2]:
        return _windowed(query, key, value, scaling, dropout, window)
    if query.is_cuda and query.dtype is torch.float32:
        # The one fused kernel for fp32 takes no shared heads; torch would form the scores instead.
        key, value = _for_each_query_head(query, key, value)
    return F.scaled_dot_product_attention(
        query, key, value, None, dropout, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )


def _for_each_query_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B,K,S,D] as [B,H,S,D]."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


def _windowed(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int) -> Tensor:
    """Blocks of queries [B,H,L,D], the last of all tokens, on the keys [B,K,S,D] in their reach."""
    # Nor do kernels that take a mask.
    key, value = _for_each_query_head(query, key, value)
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    block, back = block_of(window)
    bias, starts = _bias(block, back, window, query.dtype, query.device), range(before, before + length, block)
    reach = tuple((max(0, start - back), min(start + block, before + length)) for start in starts)
    keys, values, parts = _Overlapping.apply(key, reach), _Overlapping.apply(value, reach), []
    for start, q, k, v in zip(starts, query.split(block, dim=2), keys, values, strict=True):
        beyond = max(0, back - start)
        seen = bias[: q.shape[2], beyond : beyond + k.shape[2]]
        parts.append(F.scaled_dot_product_attention(q, k, v, seen, dropout, scale=scaling))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class _Overlapping(torch.autograd.Function):
    """Ranges of tokens of [B,K,S,D], whose gradients are added up in one tensor: ordinary slices would make a whole one each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranges: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.ranges = x.shape, ranges
        return tuple(x[:, :, first:last] for first, last in ranges)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for (first, last), gradient in zip(ctx.ranges, gradients, strict=True):
            total[:, :, first:last] += gradient
        return total, None


def _eager(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None) -> Tensor:
    """The textbook: softmax(QKᵀ·scale)V with the scores in memory, fp32 softmax."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = scores.masked_fill(~_band(query.shape[2], key.shape[2], window, query.device), float("-inf"))
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value


def _by_document(kernel: Any, query: Tensor, key: Tensor, value: Tensor, documents: Documents, *options: Any) -> Tensor:
    """Run `kernel` on each document of each row. query [B,H,S,D], key and value [B,K,S,D] → [B,H,S,D]."""
    if all(len(row) == 1 for row in documents):
        return kernel(query, key, value, *options)
    rows = []
    for b, lengths in enumerate(documents):
        parts = [t[b : b + 1].split(lengths, dim=2) for t in (query, key, value)]
        rows.append(torch.cat([kernel(*document, *options) for document in zip(*parts, strict=True)], dim=2))
    return torch.cat(rows)


def _interface(kernel: Any) -> Any:
    @torch.compiler.disable
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        documents: Documents | None = None,
        sharing: Sharing | None = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_unused: Any,  # transformers hands every attention function position ids, cache arguments and more
    ) -> tuple[Tensor, None]:
        if softcap is not None or s_aux is not None:
            raise ModelError(
                f"{type(module).__name__} needs soft-capped scores or attention sinks, which fused kernels lack", "another model"
            )
        if documents is None:
            # A compiled layer is not told of them: it would be compiled anew for every number of documents.
            documents = getattr(module, DOCUMENTS)
        options = scaling, dropout, window_of(module, sliding_window)
        if sharing is not None:
            out = sharing.attend(query, key, value, documents, *options)
        else:
            out = _by_document(kernel, query, key, value, documents, *options)
        return out.transpose(1, 2).contiguous(), None

    return attention


def _generate(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_unused: Any,  # as above
) -> tuple[Tensor, None]:
    """One row of tokens after those in the cache, within the windows that were given to the model's attention."""
    out = _windowed(query, key, value, scaling, 0.0, window_of(module, None) or key.shape[2])
    return out.transpose(1, 2).contiguous(), None


# No mask is registered under these names, and so transformers makes none: causality and document borders are the functions' own business.
AttentionInterface.register(DOCUMENT_SDPA, _interface(_fused))
AttentionInterface.register(DOCUMENT_EAGER, _interface(_eager))
AttentionInterface.register(GENERATING, _generate)


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Use transformers' own attention while generating, or one that keeps to a given window: with a cache, queries are fewer than keys."""
    training, implementation = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation(GENERATING if windowed(model) else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
