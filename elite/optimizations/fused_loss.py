"""Fused loss.

What:   head and cross-entropy in one function; logits exist for a tile of tokens only, and never wait for the backward.
How:    the causal language model's forward, given `labels_to_sum`, passes its hidden states to elite.losses.linear_cross_entropy and
        returns the sum of the losses. It stays the model's own forward, so wrappers such as DDP see it. As many matrix products as
        before: the gradient is formed in the forward, nothing is computed twice.
Memory: one tile of logits and the gradient of the hidden states, instead of 12 bytes a logit of every token. A tile of a trained head
        takes 1 GiB in fp32 or less, half of that in bf16 (on a CPU both); the head adds its fp32 gradient once more, and its copy. A
        frozen head goes by tiles of the vocabulary too: 64 MiB in bf16 or less, and 17 MiB of sums.
Source: Hsu et al. 2024, arXiv:2410.10989 (Liger); Wijmans et al. 2024, arXiv:2411.09009 (Cut Cross-Entropy) go further still.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from elite.errors import PlanError
from elite.facts import Facts
from elite.loss_tiles import frozen_tile, tile_tokens
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step

RESCALED = ("cohere", "gemma2", "gemma3n", "gemma4", "granite", "nanochat", "recurrent_gemma", "vaultgemma")
"""Architectures, by the beginning of their `model_type`, that scale or cap logits after the head."""


class FusedLoss(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        tile: int = 0
        """Tokens whose logits stand at once; 0: as many as 1 GiB of them holds in fp32, of a frozen head 17 MiB of sums."""

    name = "fused_loss"
    title = "fused head and cross-entropy"
    row = 45
    stage = Stage.executor
    exactness = Exactness.EQUAL
    claims: ClassVar[frozenset[Site]] = frozenset({Site.LOSS})
    source = "Hsu et al. 2024"

    def check(self, facts: Facts) -> str | None:
        if facts.model.model_type.startswith(RESCALED):
            return f"{facts.model.model_type} scales or caps its logits after the head"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        tokens, model = facts.micro_tokens, facts.model
        if facts.adapter == "full":
            return replace(step, loss_tile=min(self.config.tile or tile_tokens(model.vocab_size), tokens))
        tile, words = frozen_tile(tokens, model.hidden_size, model.vocab_size, self.config.tile)
        return replace(step, loss_tile=tile, loss_words=words)

    def apply(self, target: Any) -> Applied:
        from elite.optimizations.functions.loss import head_is_all, summing

        if not head_is_all(target):
            raise PlanError(
                f"{type(target).__name__} changes its logits after the head, which the fused loss would leave out",
                "optimizations.fused_loss.enabled=false",
            )
        target.forward = summing(target, self.config.tile)

        def undo() -> None:
            del target.forward

        return Applied(1, f"head of {target.get_output_embeddings().weight.shape[0]:,} tokens", undo)
