"""Sliding-window attention.

What:   a query sees itself and the `window` − 1 tokens before it, in all layers or in those chosen, of a model that has no window.
How:    each attention module carries its window, which elite's attention functions read: fused attention goes over the queries in blocks
        and hands each the keys in its reach; unfused attention masks; the streamed executor reads that far back. Generation keeps to it.
        The exported model does not carry the window: its architecture has no field for one.
Memory: grows by one mask of v · b · (b + w) bytes for blocks of b queries, which all layers share, and under flash attention by keys and
        values expanded to the query heads where these share them. It saves time: S · w instead of S² / 2 pairs of query and key.
Source: Beltagy et al. 2020, arXiv:2004.05150 (Longformer); Jiang et al. 2023, arXiv:2310.06825 (Mistral).
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from elite.errors import PlanError
from elite.facts import Facts, ModelShape
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.options import require

LEAST_BLOCK = 512
"""Queries at once, at least."""
ALIGNED = 16
"""Kernels want masks as wide as a multiple of this many keys."""


def block_of(window: int) -> tuple[int, int]:
    """Queries at once, and keys before the first of them that they are handed."""
    return -(-max(window, LEAST_BLOCK) // ALIGNED) * ALIGNED, -(-(window - 1) // ALIGNED) * ALIGNED


class SlidingWindow(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        window: int = 4096
        """Tokens that a query sees, itself included."""
        layers: list[int] = field(default_factory=list)
        """Layers that get it, counted from 0; empty: all."""

        def __post_init__(self) -> None:
            require("sliding_window.window", self.window, self.window >= 1, "must be positive")
            different = min(self.layers, default=0) >= 0 and len(set(self.layers)) == len(self.layers)
            require("sliding_window.layers", self.layers, different, "must be different numbers from 0")

    name = "sliding_window"
    title = "sliding-window attention"
    row = 27
    stage = Stage.geometry
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.ATTENTION_REACH})
    source = "Beltagy et al. 2020"

    def check(self, facts: Facts) -> str | None:
        reason = self._against(facts.model.as_loaded)
        if reason is None and self.config.window >= facts.context:
            return f"a window of {self.config.window:,} tokens sees the whole context of {facts.context:,}"
        return reason

    def _against(self, model: ModelShape) -> str | None:
        beyond = max(self.config.layers, default=0)
        if beyond >= model.num_hidden_layers:
            raise PlanError(
                f"optimizations.sliding_window.layers names layer {beyond}; {model.name} has {model.num_hidden_layers}, counted from 0",
                f"numbers up to {model.num_hidden_layers - 1}",
            )
        return f"the model has a window of {model.sliding_window:,} tokens of its own" if model.sliding_window is not None else None

    def reshaped(self, model: ModelShape) -> ModelShape:
        if self._against(model) is not None:
            return model
        return replace(model, sliding_window=self.config.window, windowed_layers=len(self.config.layers) or model.num_hidden_layers)

    def memory(self, step: Step, facts: Facts) -> Step:
        if facts.executor != "whole":
            return step
        queries, reach = block_of(self.config.window)
        mask = step.value * queries * (queries + reach)
        return replace(step, standing=replace(step.standing, batch=step.standing.batch + mask))

    def apply(self, target: Any) -> Applied:
        from elite.attention import WINDOW

        layers = target.get_decoder().layers
        chosen = [layers[index] for index in self.config.layers] or list(layers)
        modules = [module for layer in chosen for module in layer.modules() if hasattr(module, "is_causal")]
        for module in modules:
            setattr(module, WINDOW, self.config.window)

        def undo() -> None:
            for module in modules:
                delattr(module, WINDOW)

        return Applied(len(modules), f"of {len(layers)} attentions see {self.config.window:,} tokens", undo)
