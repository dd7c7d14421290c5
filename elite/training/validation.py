"""Validation: the loss on held-out files with the repository before them, and without; and a completion to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elite.attention import generating
from elite.data.batches import IGNORE, Batch
from elite.data.validation import Completion
from elite.distributed.ranks import Ranks
from elite.executor.contract import Executor
from elite.model import LoadedModel


@dataclass(frozen=True)
class Validator:
    """Scores the same held-out tokens each time it is called.

    Args:
        with_context: one row each: repository, then target; labels on the target only.
        alone: the same targets without what stands before them.
    """

    executor: Executor
    with_context: Sequence[Batch]
    alone: Sequence[Batch]
    ranks: Ranks

    def __call__(self) -> dict[str, float]:
        """`val_loss` and `val_loss_alone`, nats a token; their difference is what the context is worth."""
        return {"val_loss": self._mean(self.with_context), "val_loss_alone": self._mean(self.alone)}

    @torch.no_grad()
    def _mean(self, batches: Sequence[Batch]) -> float:
        model = self.executor.model
        training = model.training
        model.eval()
        total, tokens = 0.0, 0
        for batch in batches[self.ranks.rank :: self.ranks.world]:
            scored = (batch.labels != IGNORE).any(0).nonzero()[:, 0].to(self.ranks.device)
            total += self.executor.loss_sum(batch.to(self.ranks.device), keep=scored).item()
            tokens += batch.label_tokens
        model.train(training)
        return self.ranks.sum(total) / self.ranks.sum(float(tokens))


@torch.no_grad()
def complete(loaded: LoadedModel, tokenizer: Any, example: Completion, compute_dtype: torch.dtype, device: torch.device) -> str:
    """Greedy continuation of a held-out file, as long as its reference."""
    prompt = torch.tensor([example.prompt], device=device)
    with generating(loaded.core), torch.autocast(device.type, dtype=compute_dtype, enabled=compute_dtype != torch.float32):
        out = loaded.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(example.reference),
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.eos_token_id,
        )
    return str(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
