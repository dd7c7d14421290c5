"""Liger kernels.

What:   RMS norm, rotary embedding and SwiGLU each as one Triton kernel.
How:    liger-kernel's own patch of a loaded model (its loss is left out: optimizations.fused_loss). What it changes beyond this
        instance, names in transformers' modeling module, is put back at once; the rotary embedding is such a name alone, so it stays
        changed until undone.
Memory: SwiGLU recomputes its activation: one value less a token and unit of the MLP's width. Norms keep no fp32 copies.
Source: Hsu et al. 2024, arXiv:2410.10989; the optional package liger-kernel.
"""

import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step
from elite.optimizations.fused_kernels import fused_activation, fused_norm
from elite.optimizations.parts import Part, Sizes
from elite.optimizations.shapes import is_gated

ROTARY = "apply_rotary_pos_emb"
SUPPORTED = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "granite"})
"""Architectures with RMS norms and SwiGLU whose loaded models liger-kernel patches."""


class LigerKernels(Optimization):
    """See the module's docstring."""

    name = "liger_kernels"
    title = "Liger kernels (RMS norm, RoPE, SwiGLU)"
    row = 49
    stage = Stage.model
    exactness = Exactness.EQUAL
    claims: ClassVar[frozenset[Site]] = frozenset({Site.ELEMENTWISE})
    source = "Hsu et al. 2024"

    def check(self, facts: Facts) -> str | None:
        if facts.device.kind != "cuda":
            return "Triton kernels need a CUDA device"
        if facts.model.model_type not in SUPPORTED:
            return f"liger-kernel has no kernels for {facts.model.model_type}"
        if facts.device.present and find_spec("liger_kernel") is None:
            return "liger-kernel is not installed: pip install liger-kernel"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        if not is_gated(facts):
            return step
        return replace(step, form=replace(step.form, norm=liger_norm, activation=fused_activation))

    def apply(self, target: Any) -> Applied:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        modeling = vars(sys.modules[type(target).__module__])
        names, attributes = dict(modeling), {module: dict(vars(module)) for module in target.modules()}
        _apply_liger_kernel_to_instance(model=target, cross_entropy=False, fused_linear_cross_entropy=False)
        changed = [module for module, before in attributes.items() if vars(module) != before]
        modeling.update({name: value for name, value in names.items() if name != ROTARY})

        def undo() -> None:
            modeling[ROTARY] = names[ROTARY]
            for module in changed:
                vars(module).clear()
                vars(module).update(attributes[module])

        return Applied(len(changed), "norms and MLPs", undo)


def liger_norm(s: Sizes) -> Part:
    """Gives the dtype of its input, and writes its gradient over the one that arrives."""
    part = fused_norm(s)
    return replace(part, forward=part.whole_input, arrives=part.whole_input, leaves=0.0, hands=s.hidden)
