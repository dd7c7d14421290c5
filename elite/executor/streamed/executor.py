"""The streamed executor as a run uses it: the same contract as `elite.executor.whole`."""

import torch
from torch import Tensor, nn

from elite.data.batches import IGNORE, Batch
from elite.distributed.exchange import Exchange


class StreamedExecutor:
    """Losses of a batch, layer by layer and chunk by chunk.

    Args:
        model: one that `attach` made streamed; possibly wrapped by DDP.
        compute_dtype: of matrix products; float32 runs without autocast.
        sharing: brings the keys and values of batches that ranks share; none comes where it is unset.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype, sharing: Exchange | None = None) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.sharing = sharing
        self.label_smoothing = 0.0
        """ε of the loss; validation's executor keeps 0 (optimizations.label_smoothing)."""

    def loss_sum(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        """Sum of the token losses in nats, fp32 scalar; where ranks share the batch, of this rank's tokens.

        Args:
            batch: on the model's device.
            keep: positions [T] that are scored; None scores all.
        """
        labels = batch.labels
        if keep is not None:
            labels = torch.full_like(batch.labels, IGNORE)
            labels[:, keep] = batch.labels[:, keep]
        with torch.autocast(batch.input_ids.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            loss: Tensor = self.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                documents=batch.documents,
                shift_labels=labels,
                num_items_in_batch=1,
                label_smoothing=self.label_smoothing,
                sharing=self.sharing if batch.ranks > 1 else None,
            ).loss
        return loss
