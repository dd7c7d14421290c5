"""Tiled MLP.

What:   the MLP of a decoder layer sees a tile of tokens at a time, forward and backward.
How:    tokens are independent there, so each tile runs in torch.utils.checkpoint on its own; parameters gather the tiles' gradients.
Memory: of everything as wide as the MLP, one tile's worth instead of one micro-batch's. Costs one more forward pass of the MLPs.
        Tiles finer than some 32,768 tokens only cost time (axolotl #3666).
Source: Bekman et al. 2025, arXiv:2506.13996 (Arctic Long Sequence Training).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.shapes import split

AUTO_TILE = 32_768


class TiledMLP(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        tile: int = 0
        """Tokens at once; 0: 32,768."""

    name = "tiled_mlp"
    title = "tiled MLP"
    row = 47
    stage = Stage.executor
    exactness = Exactness.EXACT
    claims: ClassVar[frozenset[Site]] = frozenset({Site.MLP_FORWARD})
    source = "Bekman et al. 2025"

    @property
    def tile(self) -> int:
        """Tokens at once."""
        return int(self.config.tile) or AUTO_TILE

    def check(self, facts: Facts) -> str | None:
        _, mlp = split(facts.model.layer_linears)
        if not mlp or any(linear.name.count(".") != 1 or not linear.name.startswith("mlp.") for linear in mlp):
            return f"the decoder layers of {facts.model.model_type} have no plain `mlp`"
        if facts.micro_tokens <= self.tile:
            return f"a micro-batch of {facts.micro_tokens:,} tokens is one tile of {self.tile:,}"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return replace(step, form=replace(step.form, mlp_tile=min(self.tile, facts.micro_tokens)))

    def apply(self, target: Any) -> Applied:
        from elite.optimizations.functions.tiles import tiled

        mlps = [layer.mlp for layer in target.get_decoder().layers]
        before = [vars(mlp).get("forward") for mlp in mlps]
        for mlp in mlps:
            mlp.forward = tiled(mlp.forward, self.tile)

        def undo() -> None:
            for mlp, forward in zip(mlps, before, strict=True):
                del mlp.forward
                if forward is not None:
                    mlp.forward = forward

        return Applied(len(mlps), f"MLPs, {self.tile:,} tokens at once", undo)
