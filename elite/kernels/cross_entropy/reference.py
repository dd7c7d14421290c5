"""What the kernel computes, in plain torch."""

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, gradient: bool, z_loss: float = 0.0) -> Tensor:
    """Token losses [n] in nats; `logits` [n, V] become the gradient of their sum in place if `gradient`, else they are spoilt.

        loss = lse(z) − (1 − ε) z_y − ε mean(z) + ζ lse(z)²
        ∂loss/∂z = (1 + 2ζ lse(z)) softmax(z) − (1 − ε) onehot(y) − ε / V

    Args:
        logits: [n, V]; sums run in fp32, in fp64 for fp64.
        labels: [n] int64.
        ignore_index: label of tokens whose loss and gradient are 0.
        label_smoothing: ε, 0 to 1.
        z_loss: ζ, which keeps the normaliser near 1 (Chowdhery et al. 2022, arXiv:2204.02311).
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = labels != ignore_index
    index = labels.masked_fill(~valid, 0)[:, None]
    kept = 1.0 - label_smoothing
    top = z.amax(1, keepdim=True)
    z -= top
    expected = kept * z.gather(1, index)[:, 0]
    if label_smoothing:
        expected += label_smoothing * z.mean(1)
    normaliser = z.exp_().sum(1)
    lse = normaliser.log() + top[:, 0]
    losses = torch.where(valid, normaliser.log() - expected + z_loss * lse.square(), 0.0)
    if gradient:
        scored = valid.to(z.dtype)[:, None]
        z *= scored * (1.0 + 2.0 * z_loss * lse[:, None]) / normaliser[:, None]
        if label_smoothing:
            z -= scored * (label_smoothing / z.shape[1])
        z.scatter_add_(1, index, -kept * scored)
        if z is not logits:
            logits.copy_(z)
    return losses
