"""What the kernels compute, in plain torch.

A state [3, n] in fp32 (fp64 for fp64) holds, of each token's logits z seen so far: the largest m, Σ exp(z − m), the wanted one; a state
[4, n], which smoothing needs, Σ z as well. Beside it stand the sums Σ exp(z_v − m) W_v [n, d] of the head's rows. Whoever adds a tile's
share of both needs no logit twice, as in attention (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).
"""

import torch
from torch import Tensor


def begun(tokens: int, smooth: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The state before the first tile."""
    state = torch.zeros(4 if smooth else 3, tokens, dtype=dtype, device=device)
    state[0].fill_(float("-inf"))
    return state


def absorb(logits: Tensor, bias: Tensor | None, labels: Tensor, first: int, state: Tensor, sums: Tensor | None) -> None:
    """Bring `state` forward by a tile of the vocabulary.

    Args:
        logits: [n, c] without `bias`. With `sums` they become exp(z − m), else they are spoilt.
        bias: [c].
        labels: [n] int64, of the whole vocabulary.
        first: the tile's first word.
        sums: [n, d] of the tiles before, brought to the new m.
    """
    most, total, wanted, *plain = state
    z = logits.to(state.dtype)
    if bias is not None:
        z += bias
    own = labels - first
    here = (own >= 0) & (own < z.shape[1])
    wanted += torch.where(here, z.gather(1, own.where(here, 0)[:, None])[:, 0], 0.0)
    for all_logits in plain:
        all_logits += z.sum(1)
    before = most.clone()
    torch.maximum(before, z.amax(1), out=most)
    # Where every logit was −∞, so is the largest.
    base = most.where(most > float("-inf"), 0.0)
    z -= base[:, None]
    z.exp_()
    shrunk = (before - base).exp_()
    total.mul_(shrunk).add_(z.sum(1))
    if sums is not None:
        if first:
            sums *= shrunk[:, None]
        if z is not logits:
            logits.copy_(z)


def add_rows(sums: Tensor, shares: Tensor, rows: Tensor, fresh: bool) -> None:
    """Add a tile's `shares` [n, c] of the head's `rows` [c, d] to `sums` [n, d], which a `fresh` one begins.

    The products are in the sums' dtype: rounded to half they would show where a word's own row leaves little of the sum.
    """
    sums.addmm_(shares.to(sums.dtype), rows.to(sums.dtype), beta=0 if fresh else 1)


def finish(
    state: Tensor, labels: Tensor, vocab: int, ignore_index: int, label_smoothing: float, z_loss: float,
    sums: Tensor | None = None, weight: Tensor | None = None, mean: Tensor | None = None, gradient: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Token losses [n] in nats, as `cross_entropy.reference` gives them, and the gradient of the head's input.

        ∂loss/∂h = (1 + 2ζ lse(z)) Σ softmax(z)_v W_v − (1 − ε) W_y − ε mean(W)

    Args:
        sums: [n, d], those of the whole vocabulary; spoilt.
        weight: [V, d].
        mean: [d], of the rows of `weight`; only needed with smoothing.
        gradient: [n, d], written.
    """
    most, total, wanted, *plain = state
    valid, kept = labels != ignore_index, 1.0 - label_smoothing
    lse = most + total.log()
    losses = lse - kept * wanted + z_loss * lse.square()
    for all_logits in plain:
        losses -= label_smoothing * (all_logits / vocab)
    if sums is not None and weight is not None and gradient is not None:
        sums *= ((1.0 + 2.0 * z_loss * lse) / total)[:, None]
        sums.sub_(weight[labels.where(valid, 0)], alpha=kept)
        if mean is not None:
            sums.sub_(mean, alpha=label_smoothing)
        gradient.copy_(sums.where(valid[:, None], 0.0))
    return losses.where(valid, 0.0)
