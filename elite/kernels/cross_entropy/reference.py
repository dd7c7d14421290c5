"""What the kernel computes, in plain torch."""

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float, gradient: bool) -> Tensor:
    """Token losses [n] in nats; `logits` [n, V] become the gradient of their sum in place if `gradient`, else they are spoilt.

        loss = lse(z) − (1 − ε) z_y − ε mean(z)        ∂loss/∂z = softmax(z) − (1 − ε) onehot(y) − ε / V

    Args:
        logits: [n, V]; sums run in fp32, in fp64 for fp64.
        labels: [n] int64.
        ignore_index: label of tokens whose loss and gradient are 0.
        label_smoothing: ε, 0 to 1.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = labels != ignore_index
    index = labels.masked_fill(~valid, 0)[:, None]
    kept = 1.0 - label_smoothing
    z -= z.amax(1, keepdim=True)
    expected = kept * z.gather(1, index)[:, 0]
    if label_smoothing:
        expected += label_smoothing * z.mean(1)
    normaliser = z.exp_().sum(1)
    losses = torch.where(valid, normaliser.log() - expected, 0.0)
    if gradient:
        scored = valid.to(z.dtype)[:, None]
        z *= scored / normaliser[:, None]
        if label_smoothing:
            z -= scored * (label_smoothing / z.shape[1])
        z.scatter_add_(1, index, -kept * scored)
        if z is not logits:
            logits.copy_(z)
    return losses
