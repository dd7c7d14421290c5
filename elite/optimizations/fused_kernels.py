"""Fused kernels.

What:   RMS and layer norm, rotary embedding (whole or of a part of each head), SwiGLU and tanh-GELU, and the sums and dropouts of the
        residual stream, each as one Triton kernel forward and one backward; Phi included.
How:    norms, attention modules, gated MLPs, activations and decoder layers of the loaded model get another forward. Each is replaced
        only if the fused formula gives what the module gives, tried on a few values: architectures scale and order differently.
        `norms`, `rotary`, `activations` and `residuals` can be turned off one by one.
Memory: activations are computed again in the backward: one value less a token and unit of a gated MLP's width, three less where GELU is
        written out as a formula. Their gradients lie where their inputs lay: of the gradients as wide as the MLP, one remains.
Source: Zhang and Sennrich 2019, arXiv:1910.07467; Ba et al. 2016, arXiv:1607.06450; Su et al. 2021, arXiv:2104.09864; Shazeer 2020,
        arXiv:2002.05202; fused after Liger (Hsu et al. 2024, arXiv:2410.10989).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from elite.facts import FORMULA_GELU, Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.parts import NUMBER_BYTES, Part, Sizes
from elite.optimizations.shapes import is_gated

if TYPE_CHECKING:
    from torch import Tensor

    from elite.optimizations.functions.blocks import Norm

SILU = frozenset({"SiLU", "SiLUActivation"})
GELU = frozenset({"NewGELUActivation", "GELUTanh", "PytorchGELUTanh"})
"""Names of classes in transformers and torch."""
GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
TOLERANCE = 1e-4
"""Largest difference of a norm from the kernel's formula, in fp32."""


class FusedKernels(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Which kernels."""

        norms: bool = True
        """RMS and layer norm."""
        rotary: bool = True
        """Rotary embedding of queries and keys, in place."""
        activations: bool = True
        """SwiGLU and tanh-GELU."""
        residuals: bool = True
        """Sums of the residual stream: with the norm that follows, or with the dropouts before them."""

    name = "fused_kernels"
    title = "fused kernels (norms, rotary, SwiGLU, GELU, residual sums)"
    row = 41
    stage = Stage.model
    exactness = Exactness.EQUAL
    claims: ClassVar[frozenset[Site]] = frozenset({Site.ELEMENTWISE})
    source = "Hsu et al. 2024"

    def check(self, facts: Facts) -> str | None:
        return None if facts.device.kind == "cuda" else "Triton kernels need a CUDA device"

    def memory(self, step: Step, facts: Facts) -> Step:
        form, on = step.form, self.config
        if on.norms:
            form = replace(form, norm=fused_norm)
        if on.rotary:
            form = replace(form, rotary=fused_rotary, turned_in_place=True)
        if on.activations and (is_gated(facts) or facts.model.model_type in FORMULA_GELU):
            form = replace(form, activation=fused_activation)
        if on.residuals:
            form = replace(form, keeps_masks=False)
        return replace(step, form=form)

    def apply(self, target: Any) -> Applied:
        replaced = dict[str, list[Any]]()
        for kind, found in self._kinds(target):
            replaced[kind] = [module for module, _ in found]
            for module, forward in found:
                # The instance's attribute hides the class's method, so nothing but this model changes.
                module.forward = forward

        def undo() -> None:
            for modules in replaced.values():
                for module in modules:
                    del module.forward

        counts = ", ".join(f"{len(modules)} {kind}" for kind, modules in replaced.items())
        return Applied(sum(map(len, replaced.values())), f"modules ({counts})", undo)

    def _kinds(self, target: Any) -> "Iterator[tuple[str, list[tuple[Any, Callable[..., Any]]]]]":
        """What takes which forward, by kind."""
        from elite.optimizations.functions.blocks import fused_attention, fused_layer

        modules = list(target.modules())
        norms = {module: norm for module in modules if (norm := _norm(module)) is not None}
        if self.config.norms:
            yield "norms", [(module, _normed(norm)) for module, norm in norms.items()]
        if self.config.activations:
            yield "activations", _found(modules, _activation)
        if self.config.rotary:
            yield "rotary embeddings", _found(modules, fused_attention)
        if self.config.residuals:
            yield "residual sums", _found(modules, lambda module: fused_layer(module, norms))


def fused_norm(s: Sizes) -> Part:
    """Keeps its input as it is, and a number or two a row."""
    kept, out = s.hidden * s.d * s.tokens, s.value * s.d * s.tokens
    numbers = (1 if is_gated(s.facts) else 2) * NUMBER_BYTES * s.tokens
    return Part("norm", kept + numbers, small=numbers, whole_input=kept, forward=out, arrives=out, leaves=kept, hands=s.value)


def fused_rotary(s: Sizes) -> Part:
    """In place; so are gradients if attention lays them out as projections do, which is not counted on."""
    turned = s.value * (s.queries + s.keys) * s.tokens
    return Part("rotary", arrives=turned, leaves=turned)


def fused_activation(s: Sizes) -> Part:
    """Keeps what it reads; gradients are written over it."""
    product = s.value * s.f * s.tokens
    return Part("activation", (2 if is_gated(s.facts) else 1) * product, forward=product, arrives=product, hands=s.value, wide=True)


def _found(modules: list[Any], make: "Callable[[Any], Callable[..., Any] | None]") -> "list[tuple[Any, Callable[..., Any]]]":
    return [(module, forward) for module in modules if (forward := make(module)) is not None]


def _activation(module: Any) -> "Callable[[Tensor], Tensor] | None":
    """The forward of an activation or a gated MLP, None if it has neither form."""
    from torch import nn

    if type(module).__name__ in GELU or (type(module) is nn.GELU and module.approximate == "tanh"):
        return _gelu
    if all(hasattr(module, name) for name in GATED) and type(module.act_fn).__name__ in SILU:
        return _gated(module)
    return None


def _norm(module: Any) -> "Norm | None":
    """The module as a norm that the kernel can compute, None if it is not one."""
    from torch import nn

    from elite.optimizations.functions.blocks import Norm

    if type(module) is nn.LayerNorm and module.weight is not None and len(module.normalized_shape) == 1:
        return Norm(module, module.eps, center=True)
    if type(module).__name__.endswith("RMSNorm") and getattr(module, "weight", None) is not None:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        return Norm(module, eps, center=False) if eps is not None and _is_rms_norm(module, eps) else None
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


def _normed(norm: "Norm") -> "Callable[[Tensor], Tensor]":
    from elite.kernels.norm.kernel import norm as kernel
    from elite.optimizations.functions.blocks import read_dtype

    def forward(x: "Tensor") -> "Tensor":
        return kernel(x, *norm.tensors, norm.eps, norm.center, dtype=read_dtype(x))[0]

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
