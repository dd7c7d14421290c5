"""PagedAttention.

What:   while text is generated, keys and values lie in pages of a few hundred tokens; continuations of one prompt share its full pages.
How:    transformers' continuous batching. The prompt is read once, in pieces, and its sequence forked: full pages are referred to, only the
        last, unfinished one is copied. Without it, each continuation has all keys and values to itself. With the flash-attn package a
        kernel reads the pages where they lie; otherwise one layer's keys and values are gathered, for a continuation at a time.
Memory: prompt + n · continuation tokens of keys and values for n continuations, instead of n · (prompt + continuation); activations of
        `piece` tokens instead of the whole prompt's; one layer's keys and values once more, and a mask of `piece` values a token.
        Training is not touched: what grows is how long a prompt there is room for (elite/plan/generation.py).
Source: Kwon et al. 2023, arXiv:2309.06180; transformers.
"""

from dataclasses import dataclass
from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.options import require
from elite.optimizations.targets import GenerationBuild

MIN_PAGE = 4
"""The library's own limit."""


class PagedAttention(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        page: int = 256
        """Tokens of a page."""
        piece: int = 1024
        """Tokens of the prompt that are read at once."""

        def __post_init__(self) -> None:
            require("paged_attention.page", self.page, self.page >= MIN_PAGE, f"must be at least {MIN_PAGE}")
            require("paged_attention.piece", self.piece, self.piece >= 1, "must be at least 1")

    name = "paged_attention"
    title = "paged keys and values in generation"
    row = 40
    stage = Stage.generation
    exactness = Exactness.EXACT
    claims: ClassVar[frozenset[Site]] = frozenset({Site.GENERATION_CACHE})
    source = "Kwon et al. 2023"

    def check(self, facts: Facts) -> str | None:
        if not facts.generates:
            return "nothing is generated in this run (training.completion_tokens=0, or optimizations.zero_3)"
        if facts.model.sliding_window is not None:
            return "windowed layers drop what continuations would share"
        if facts.model.unstreamable:
            # What keeps a model from being streamed (other layers than attention, sinks, capped scores) keeps it from pages, too.
            return f"not for this model: {facts.model.unstreamable}"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: GenerationBuild) -> Applied:
        before = target.page, target.piece
        target.page, target.piece = self.config.page, self.config.piece

        def undo() -> None:
            target.page, target.piece = before

        return Applied(1, f"cache, in pages of {self.config.page} tokens", undo)
