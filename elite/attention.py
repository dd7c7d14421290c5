"""Causal attention that stays inside documents, registered with transformers' AttentionInterface.

A packed sequence is attended document by document, so no mask is formed, however long it is. The caller passes
`documents=` to the model's forward: for each row the lengths of its documents, which sum to S.

Shapes: B rows, H query heads, K key/value heads (H % K == 0), S tokens, D head dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from elite.errors import ModelError

DOCUMENT_SDPA = "elite_document_sdpa"
DOCUMENT_EAGER = "elite_document_eager"

Documents = tuple[tuple[int, ...], ...]


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """[length, length] mask, true where a query may look: itself and the past, at most `window` tokens in all."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def _fused(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None) -> Tensor:
    length = query.shape[2]
    mask = None if window is None or window >= length else _band(length, window, query.device)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )


def _eager(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None) -> Tensor:
    """The textbook: softmax(QKᵀ·scale)V with the scores in memory, fp32 softmax."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = scores.masked_fill(~_band(query.shape[2], window, query.device), float("-inf"))
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
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        documents: Documents,
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
        out = _by_document(kernel, query, key, value, documents, scaling, dropout, sliding_window)
        return out.transpose(1, 2).contiguous(), None

    return attention


# No mask is registered under these names, and so transformers makes none: causality and document borders are the functions' own business.
AttentionInterface.register(DOCUMENT_SDPA, _interface(_fused))
AttentionInterface.register(DOCUMENT_EAGER, _interface(_eager))


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Use transformers' own attention while generating: with a cache, queries are fewer than keys."""
    training, implementation = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)
        model.train(training)
