"""A causal language model's forward that may end in the loss instead of logits."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elite.losses import linear_cross_entropy


def summing(core: Any, tile: int) -> Callable[..., Any]:
    """The forward of `core` with two arguments more: `labels_to_sum` [B, S] makes it return the sum of the token losses in nats, smoothed
    by `label_smoothing`.

    With `logits_to_keep` (positions [K]) the labels are [B, K]. Everything else is as the model has it.
    """
    plain = core.forward

    @wraps(plain)  # generation reads the signature
    def forward(
        *args: Any, labels_to_sum: Tensor | None = None, label_smoothing: float = 0.0, logits_to_keep: Any = 0, **kwargs: Any
    ) -> Any:
        if labels_to_sum is None:
            return plain(*args, logits_to_keep=logits_to_keep, **kwargs)
        # peft hands on its whole signature, and a decoder takes less than its causal model.
        given = {name: value for name, value in kwargs.items() if value is not None}
        hidden = core.get_decoder()(*args, **given).last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        head = core.get_output_embeddings()
        return linear_cross_entropy(
            *(hidden.flatten(0, 1), head.weight, head.bias, labels_to_sum.flatten()), label_smoothing=label_smoothing, tile=tile
        )

    return forward


@torch.no_grad()
def head_is_all(core: Any) -> bool:
    """Whether the logits are the head's linear map of the decoder's output and nothing more, tried on two tokens."""
    head = core.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    tokens = torch.tensor([[0, 1]], device=head.weight.device)
    training, half = core.training, head.weight.dtype in (torch.bfloat16, torch.float16)
    core.eval()
    with torch.autocast(head.weight.device.type, dtype=head.weight.dtype if half else None, enabled=half):
        given: dict[str, Any] = {"input_ids": tokens, "documents": ((2,),), "use_cache": False}
        logits = core(**given).logits
        expected = F.linear(core.get_decoder()(**given).last_hidden_state, head.weight, head.bias)
    core.train(training)
    return torch.allclose(logits.float(), expected.float(), rtol=1e-3, atol=1e-4)
