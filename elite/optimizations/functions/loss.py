"""A causal language model's forward that may end in the loss instead of logits."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from elite.losses import linear_cross_entropy

LARGE = 100.0
"""Values of a hidden state at most, when a head is tried."""


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
    """Whether the logits are the head's linear map of the decoder's output and nothing more, tried on two tokens.

    The decoder itself stands aside: its kernels need not run where its weights lie now.
    """
    head, decoder = core.get_output_embeddings(), core.get_decoder()
    if not isinstance(head, nn.Linear):
        return False
    tokens, half = torch.tensor([[0, 1]], device=head.weight.device), head.weight.dtype in (torch.bfloat16, torch.float16)
    # Large enough for what caps logits to show.
    hidden = torch.linspace(-LARGE, LARGE, 2 * head.in_features, device=head.weight.device).view(1, 2, -1).to(head.weight.dtype)
    own = vars(decoder).get("forward")
    decoder.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        with torch.autocast(head.weight.device.type, dtype=head.weight.dtype if half else None, enabled=half):
            logits = core(input_ids=tokens, documents=((2,),), use_cache=False).logits
            expected = F.linear(hidden, head.weight, head.bias)
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own
    return torch.allclose(logits.float(), expected.float(), rtol=1e-3, atol=1e-4)
