"""Gradient checkpointing.

What:   a decoder layer keeps only its input and recomputes the rest in the backward pass.
How:    each layer's forward is wrapped in torch.utils.checkpoint (non-reentrant; random state is restored, so dropout agrees). Products
        that no gradient reads, such as that of an MLP's output map, are found by trying and left out of the recomputation.
Memory: saved activations fall to one [tokens, hidden] tensor a layer; one layer's activations come back while it is recomputed.
        Costs one more forward pass of the layers.
Source: Chen et al. 2016, arXiv:1604.06174; torch.utils.checkpoint.
"""

from dataclasses import replace
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step


class GradientCheckpointing(Optimization):
    """See the module's docstring."""

    name = "gradient_checkpointing"
    title = "gradient checkpointing"
    row = 4
    stage = Stage.executor
    exactness = Exactness.EXACT
    claims: ClassVar[frozenset[Site]] = frozenset({Site.LAYER_ACTIVATIONS})
    source = "Chen et al. 2016"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return replace(step, recomputed=True)

    def apply(self, target: Any) -> Applied:
        from elite.optimizations.functions.recompute import Recomputed

        layers = target.get_decoder().layers
        return Applied(len(layers), "decoder layers", Recomputed(layers).undo)
