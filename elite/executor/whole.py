"""The whole executor: one ordinary forward and backward over the entire sequence."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elite.data.batches import IGNORE, Batch
from elite.distributed.ring import Ring


class WholeExecutor:
    """Losses of a batch, by the model's own forward.

    Args:
        model: a causal language model that uses one of `elite.attention`'s functions; possibly wrapped by DDP.
        compute_dtype: of matrix products; float32 runs without autocast.
        fused_loss: the model's forward sums the losses itself, given `labels_to_sum` (optimizations.fused_loss).
        sharing: carries out the attention of batches that ranks share; none comes where it is unset.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype, fused_loss: bool = False, sharing: Ring | None = None) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.fused_loss = fused_loss
        self.sharing = sharing
        self.label_smoothing = 0.0
        """ε of the loss; validation's executor keeps 0 (optimizations.label_smoothing)."""

    def loss_sum(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        """Sum of the token losses in nats, fp32 scalar; where ranks share the batch, of this rank's tokens.

        Args:
            batch: on the model's device.
            keep: positions [T] whose logits are formed; None forms all. Validation scores the end of a long context.
        """
        labels = batch.labels if keep is None else batch.labels[:, keep]
        extra: dict[str, Any] = {} if keep is None else {"logits_to_keep": keep}
        if batch.ranks > 1:
            assert self.sharing is not None
            extra["sharing"] = self.sharing
        if self.fused_loss:
            extra |= {"labels_to_sum": labels, "label_smoothing": self.label_smoothing}
        with torch.autocast(batch.input_ids.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            out = self.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, documents=batch.documents, use_cache=False, **extra
            )
        if self.fused_loss:
            loss: Tensor = out
            return loss
        logits = out.logits.float().flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=self.label_smoothing)
