"""One program a token: a pass over its logits for maximum and sum, a second one that turns them into their gradient.

Logits are read twice and written once in their own dtype, where plain torch makes about ten passes over an fp32 copy. A row of the
second pass mostly comes from the cache. Formulas are those of `reference.py`. Source: Hsu et al. 2024, arXiv:2410.10989 (Liger).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from elite.kernels.launch import Launch

BLOCK = 4096
"""Logits a program holds at once."""
WARPS = 32


@triton.jit
def _kernel(
    logits,
    labels,
    losses,
    row_stride,
    vocab,
    ignore_index,
    smoothing,
    z_loss,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    label = tl.load(labels + token)
    columns = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses + token, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                tl.store(row + start + columns, tl.zeros([BLOCK], tl.float32).to(logits.dtype.element_ty), mask=start + columns < vocab)
        return

    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    # Lane by lane, so that the loop reduces nothing; a lane that has seen nothing yet keeps sum 0.
    for start in range(0, vocab, BLOCK):
        inside = start + columns < vocab
        z = tl.load(row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, z)
        total = tl.where(inside, total * tl.exp(most - higher) + tl.exp(z - higher), total)
        most = higher
        plain += tl.where(inside, z, 0.0)
    top = tl.max(most, 0)
    lse = top + tl.log(tl.sum(tl.where(most > float("-inf"), total * tl.exp(most - top), 0.0), 0))
    target = tl.load(row + label).to(tl.float32)
    tl.store(losses + token, lse - (1.0 - smoothing) * target - smoothing * tl.sum(plain, 0) / vocab + z_loss * lse * lse)

    if GRADIENT:
        share = 1.0 + 2.0 * z_loss * lse
        for start in range(0, vocab, BLOCK):
            inside = start + columns < vocab
            z = tl.load(row + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = share * tl.exp(z - lse) - smoothing / vocab - tl.where(start + columns == label, 1.0 - smoothing, 0.0)
            tl.store(row + start + columns, gradient.to(logits.dtype.element_ty), mask=inside)


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, gradient: bool, z_loss: float = 0.0) -> Tensor:
    """As `reference.cross_entropy`, for fp32, bf16 and fp16 logits with contiguous rows."""
    tokens, vocab = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    numbers = logits.stride(0), vocab, ignore_index
    _launch_of(gradient, vocab)((tokens,), (logits, labels, losses), numbers, (float(label_smoothing), float(z_loss)))
    return losses


@cache
def _launch_of(gradient: bool, vocab: int) -> Launch:
    return Launch(_kernel, GRADIENT=gradient, BLOCK=min(BLOCK, triton.next_power_of_2(vocab)), num_warps=WARPS)
