"""The streamed executor as a run uses it: the same contract as `elite.executor.whole`."""

import torch
from torch import Tensor, nn

from elite.data.batches import IGNORE, Batch


class StreamedExecutor:
    """Losses of a batch, layer by layer and chunk by chunk.

    Args:
        model: one that `attach` made streamed; possibly wrapped by DDP.
        compute_dtype: of matrix products; float32 runs without autocast.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self.label_smoothing = 0.0
        """ε of the loss; validation's executor keeps 0 (optimizations.label_smoothing)."""

    def loss_sum(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        """Sum of the token losses in nats, fp32 scalar.

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
            ).loss
        return loss
