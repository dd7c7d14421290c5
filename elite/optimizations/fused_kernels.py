"""Fused kernels.

What:   RMS and layer norm, SwiGLU and tanh-GELU each as one Triton kernel forward and one backward; Phi, GPT-NeoX and StarCoder2 included.
How:    norms, gated MLPs and activations of the loaded model get another forward. A norm is replaced only if the kernel's formula gives
        what it gives, tried on a few values: some architectures scale by 1 + w or in another order.
Memory: activations are computed again in the backward: one value less a token and unit of a gated MLP's width, three less where GELU is
        written out as a formula.
Source: Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450; Shazeer 2020, arXiv:2002.05202; fused after Liger
        (Hsu et al. 2024, arXiv:2410.10989).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Estimate, Exactness, Optimization, Site, Stage
from elite.optimizations.shapes import FORMULA_GELU, is_gated, mlp_width, value_bytes

if TYPE_CHECKING:
    from torch import Tensor

SILU = frozenset({"SiLU", "SiLUActivation"})
GELU = frozenset({"NewGELUActivation", "GELUTanh", "PytorchGELUTanh"})
"""Names of classes in transformers and torch."""
GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
TOLERANCE = 1e-4
"""Largest difference of a norm from the kernel's formula, in fp32."""


class FusedKernels(Optimization):
    """See the module's docstring."""

    name = "fused_kernels"
    title = "fused kernels (norms, SwiGLU, GELU)"
    row = 41
    stage = Stage.model
    exactness = Exactness.EQUAL
    claims: ClassVar[frozenset[Site]] = frozenset({Site.ELEMENTWISE})
    source = "Hsu et al. 2024"

    def check(self, facts: Facts) -> str | None:
        return None if facts.device.kind == "cuda" else "Triton kernels need a CUDA device"

    def memory(self, estimate: Estimate, facts: Facts) -> Estimate:
        values = 1 if is_gated(facts) else 3 if facts.model.model_type in FORMULA_GELU else 0
        spared = values * facts.model.num_hidden_layers * facts.micro_tokens * mlp_width(facts) * value_bytes(estimate, facts)
        return replace(estimate, saved_activations=max(estimate.saved_activations - spared, 0.0))

    def apply(self, target: Any) -> Applied:
        found = [(module, forward) for module in target.modules() if (forward := _fused(module)) is not None]
        for module, forward in found:
            # The instance's attribute hides the class's method, so nothing but this model changes.
            module.forward = forward

        def undo() -> None:
            for module, _ in found:
                del module.forward

        return Applied(len(found), "norms, gated MLPs and activations", undo)


def _fused(module: Any) -> "Callable[[Tensor], Tensor] | None":
    """The forward that takes the place of the module's, None if it has none of these forms."""
    from torch import nn

    kind = type(module).__name__
    if kind in GELU or (type(module) is nn.GELU and module.approximate == "tanh"):
        return _gelu
    if all(hasattr(module, name) for name in GATED) and type(module.act_fn).__name__ in SILU:
        return _gated(module)
    if type(module) is nn.LayerNorm and module.weight is not None and len(module.normalized_shape) == 1:
        return _norm(module, module.bias, module.eps, center=True)
    if kind.endswith("RMSNorm") and hasattr(module, "weight"):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return _norm(module, None, eps, center=False) if eps is not None and _is_rms_norm(module, eps) else None
    return None


def _is_rms_norm(module: Any, eps: float) -> bool:
    """Whether the module's own forward is the kernel's formula."""
    import torch

    from elite.kernels.norm.reference import norm

    weight = module.weight.detach()
    values = torch.linspace(-2, 3, weight.numel(), device=weight.device)[None] ** 2
    with torch.no_grad():
        # A weight of its own, as fresh ones are alike; the module's own dtype may be half.
        module.weight.data = torch.linspace(0.5, 1.5, weight.numel(), device=weight.device)
        try:
            own = module(values)
            expected, _ = norm(values, module.weight, None, eps, False)
        finally:
            module.weight.data = weight
    return own.shape == expected.shape and bool((own - expected).abs().max() <= TOLERANCE)


def _norm(module: Any, bias: Any, eps: float, center: bool) -> "Callable[[Tensor], Tensor]":
    from elite.kernels.norm.kernel import norm

    def forward(x: "Tensor") -> "Tensor":
        return norm(x, module.weight, bias, eps, center)[0]

    return forward


def _gated(module: Any) -> "Callable[[Tensor], Tensor]":
    from elite.kernels.gate.kernel import swiglu

    def forward(x: "Tensor") -> "Tensor":
        # Looked up at each call: adapters take the maps' places later.
        out: Tensor = module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))
        return out

    return forward


def _gelu(x: "Tensor") -> "Tensor":
    from elite.kernels.gate.kernel import gelu_tanh

    return gelu_tanh(x)
