"""Fused LoRA.

What:   an adapted linear map in a handful of kernels: no separate scaling, sum and dtype conversions of whole activations.
How:    one autograd function a map instead of peft's forward. out = x Wᵀ + b, then out += (x Aᵀ)(s B)ᵀ in place, both as matrix
        products that add to their output; backward dx = dout W, then dx += (dout s B) A in place. Dropout stays peft's own.
        A quantised base keeps its own forward, to whose output one matrix product adds the adapter's.
Memory: nothing at rest: the input and the adapter's r values a token are kept, as by peft. Transient copies of the output go.
Source: Hu et al. 2021, arXiv:2106.09685; the fused form after Unsloth's and LoRAFusion's (Zhu et al. 2025, arXiv:2510.00206).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Estimate, Exactness, Optimization, Site, Stage

if TYPE_CHECKING:
    from torch import Tensor


class FusedLoRA(Optimization):
    """See the module's docstring."""

    name = "fused_lora"
    title = "fused LoRA linear maps"
    row = 46
    stage = Stage.executor
    exactness = Exactness.EQUAL
    claims: ClassVar[frozenset[Site]] = frozenset({Site.LORA_FORWARD})
    source = "Hu et al. 2021"

    def check(self, facts: Facts) -> str | None:
        if facts.adapter != "lora":
            return "there are no adapters to fuse: adapter.method=lora"
        return None

    def memory(self, estimate: Estimate, facts: Facts) -> Estimate:
        return estimate

    def apply(self, target: Any) -> Applied:
        from peft.tuners.lora import LoraLayer

        adapted: list[Any] = [module for module in target.modules() if isinstance(module, LoraLayer)]
        plain = [module for module in adapted if _is_plain(module)]
        for module in plain:
            # The instance's attribute hides the class's method, so nothing but this model changes.
            module.forward = _forward(module)
            if _is_whole(module):
                # Set where a recomputation needs the gradients of this map, but not what it returns.
                module.output_unread = False

        def undo() -> None:
            for module in plain:
                del module.forward
                if _is_whole(module):
                    del module.output_unread

        return Applied(len(plain), f"of {len(adapted)} adapted linear maps", undo)


def _is_plain(module: Any) -> bool:
    """Whether this is LoRA as published: one adapter of two matrices, no variant (DoRA and its like), no bias of its own."""
    from torch import nn

    if len(module.active_adapters) != 1 or module.active_adapters[0] not in module.lora_A:
        return False
    name = module.active_adapters[0]
    pair = (module.lora_A[name], module.lora_B[name])
    return name not in module.lora_variant and all(type(linear) is nn.Linear and linear.bias is None for linear in pair)


def _is_whole(module: Any) -> bool:
    """Whether base and adapter are one function: a quantised base keeps its own."""
    from torch import nn

    return type(module.base_layer) is nn.Linear and not module.base_layer.weight.requires_grad


def _forward(module: Any) -> Callable[..., "Tensor"]:
    """The forward that replaces `module`'s; where the adapter is off or merged, or more is asked, peft's own answers."""
    from elite.optimizations.functions.lora import adapted_linear, add_low_rank

    peft_forward, base = module.forward, module.base_layer
    name = module.active_adapters[0]
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    whole = _is_whole(module)

    def forward(x: "Tensor", *args: Any, **kwargs: Any) -> "Tensor":
        if module.disable_adapters or module.merged or args or kwargs:
            out: Tensor = peft_forward(x, *args, **kwargs)
            return out
        # An inactive dropout is the identity, which returns the same tensor.
        dropped, scaling = dropout(x), module.scaling[name]
        if whole:
            return adapted_linear(x, dropped, base.weight, base.bias, a.weight, b.weight, scaling, module.output_unread)
        return add_low_rank(base(x), dropped, a.weight, b.weight, scaling)

    return forward
