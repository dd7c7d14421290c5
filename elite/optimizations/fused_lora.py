"""Fused LoRA.

What:   an adapted linear map in a handful of kernels: no separate scaling, sum and dtype conversions of whole activations.
How:    one autograd function a map instead of peft's forward. out = x Wᵀ + b, then out += (x Aᵀ)(s B)ᵀ in place, both as matrix
        products that add to their output; backward dx = dout W, then dx += (dout s B) A in place. Dropout stays peft's own.
        Maps that siblings call on the same tensor (queries, keys, values; gate, up) are one function, which the first of them calls.
        A quantised base keeps its own forward, to whose output one matrix product adds the adapter's.
Memory: a copy of the adapters in the compute dtype, made once a step (peft's are made at every use), with zeros where siblings are one
        function. The input and the adapter's r values a token are kept, as by peft. Transient copies of the output go.
Source: Hu et al. 2021, arXiv:2106.09685; the fused form after Unsloth's and LoRAFusion's (Zhu et al. 2025, arXiv:2510.00206).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from elite.facts import Facts, LinearShape
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step
from elite.optimizations.parts import FP32, Part, Sizes
from elite.optimizations.shapes import adapter_rank

if TYPE_CHECKING:
    from torch import Tensor

    from elite.optimizations.functions.lora import AdaptedMap

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names under which transformers' layers keep maps of one input, in the order of their calls."""


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

    def memory(self, step: Step, facts: Facts) -> Step:
        copies = (facts.trainable_params + _zeros(facts)) * step.value
        standing = replace(step.standing, trainable_copy=step.standing.trainable_copy + copies)
        return replace(step, standing=standing, form=replace(step.form, maps=fused_maps))

    def apply(self, target: Any) -> Applied:
        from peft.tuners.lora import LoraLayer

        adapted: list[Any] = [module for module in target.modules() if isinstance(module, LoraLayer)]
        plain = [module for module in adapted if _is_plain(module)]
        shared = {id(module): group for group in _groups(target, plain) for module in group.maps}
        for module in plain:
            # The instance's attribute hides the class's method, so nothing but this model changes.
            module.forward = _forward(module, shared.get(id(module)))
            if _is_whole(module):
                # Set where a recomputation needs the gradients of this map, but not what it returns.
                module.output_unread = False

        def undo() -> None:
            for module in plain:
                del module.forward
                if _is_whole(module):
                    del module.output_unread

        return Applied(len(plain), f"of {len(adapted)} adapted linear maps", undo)


def fused_maps(s: Sizes, maps: Sequence[LinearShape], read: float, kept: bool) -> Part:
    """Maps of one input; their products copy what stands beside the rank (elite/optimizations/functions/lora.py)."""
    rank, into, tokens = adapter_rank(s.facts), maps[0].inputs, s.tokens
    ranks, outputs = rank * len(maps), [m.outputs for m in maps]
    if len(maps) > 1:
        # Forward: the input beside its low-rank values, a weight beside the adapter's, made while the one before it is still there;
        # backward: what is narrower than the input.
        ahead = (into + ranks) * tokens + max(
            (into + ranks) * outputs[-1], (into + ranks) * (outputs[-2] + outputs[-1]) - outputs[-1] * tokens
        )
        few = sum(out for out in outputs if out < into)
        back = (few + ranks) * (tokens + into)
    else:
        ahead = _copied(into, tokens, outputs[0], rank)
        back = _copied(outputs[0], tokens, into, rank)
    returned = sum(outputs) * s.value * tokens
    converted = (s.value if read != s.value else 0) * into * tokens
    own = FP32 * rank * sum(into + out for out in outputs)
    return Part(
        "maps",
        saved=(0 if kept else into * read * tokens) + ranks * s.value * tokens,
        small=ranks * s.value * tokens,
        forward=returned + s.value * ahead + converted,
        spared=s.value * ahead,
        arrives=returned,
        leaves=into * read * tokens,
        keeps_input=True,
        # The gradient in the compute dtype goes into one as wide as the input was; the copies are gone by then.
        work=max(s.value * back - (read - s.value) * into * tokens, converted) + ranks * s.value * tokens + own,
    )


def _copied(inner: int, rows: int, columns: int, rank: int) -> int:
    """Values that one product instead of two copies (`_sum_of_products`)."""
    return (inner + rank) * (rows + columns) if inner * (rows + columns) < rows * columns else 0


def _zeros(facts: Facts) -> int:
    """Zeros beside the B's of siblings, all layers: each has room for the values of all."""
    outputs = {linear.name.rsplit(".", 1)[-1]: linear.outputs for linear in facts.model.layer_linears}
    groups = [[outputs[name] for name in names] for names in SIBLINGS if outputs.keys() >= set(names)]
    return facts.model.num_hidden_layers * adapter_rank(facts) * sum((len(group) - 1) * sum(group) for group in groups)


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


class _SharedInput:
    """Sibling maps that are called on one tensor, one after another: the call of the first computes all.

    Args:
        maps: adapted linear maps in the order in which they are called.
    """

    def __init__(self, maps: list[Any]) -> None:
        from elite.optimizations.functions.lora import Operands

        self.maps = maps
        self._operands = Operands()
        self._input: Any = None
        self._state: tuple[object, ...] = ()
        self._outputs: dict[int, Tensor] = {}

    def output(self, module: Any, x: "Tensor") -> "Tensor | None":
        """The output of one of the maps, None if it has to be computed on its own."""
        from elite.optimizations.functions.lora import adapted_linears

        state = _state(x)
        if module is self.maps[0] and all(_alone(map_) for map_ in self.maps):
            outputs = adapted_linears(x, [_tensors(map_) for map_ in self.maps], self._operands)
            self._outputs = dict(zip(map(id, self.maps), outputs, strict=True))
            self._input, self._state = x, state
        elif self._input is not x or self._state != state:
            return None
        out = self._outputs.pop(id(module), None)
        if not self._outputs:
            self._input = None
        return out


def _state(x: "Tensor") -> tuple[object, ...]:
    """Two calls with the same tensor and the same of this give the same output."""
    import torch

    return torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type), None if x.is_inference() else x._version


def _alone(module: Any) -> bool:
    """Whether nothing but x and the map's own matrices determines what it returns."""
    dropout = module.lora_dropout[module.active_adapters[0]]
    return not (module.disable_adapters or module.merged or module.output_unread or (dropout.training and getattr(dropout, "p", 0.0)))


def _tensors(module: Any) -> "AdaptedMap":
    from elite.optimizations.functions.lora import AdaptedMap

    name, base = module.active_adapters[0], module.base_layer
    return AdaptedMap(base.weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def _groups(target: Any, plain: list[Any]) -> list[_SharedInput]:
    """Siblings among the whole maps of `plain` that a decoder layer calls on one tensor."""
    from elite.optimizations.functions.lora import ALIGNMENT

    usable, found = {id(module) for module in plain if _is_whole(module)}, []
    for parent in target.modules():
        for names in SIBLINGS:
            maps: list[Any] = [getattr(parent, name, None) for name in names]
            if all(id(module) in usable for module in maps) and sum(len(_tensors(module).a) for module in maps) % ALIGNMENT == 0:
                found.append(_SharedInput(maps))
    return found


def _forward(module: Any, shared: _SharedInput | None) -> Callable[..., "Tensor"]:
    """The forward that replaces `module`'s; where the adapter is off or merged, or more is asked, peft's own answers."""
    from elite.optimizations.functions.lora import Operands, adapted_linear, add_low_rank

    peft_forward, base = module.forward, module.base_layer
    dropout = module.lora_dropout[module.active_adapters[0]]
    whole, operands = _is_whole(module), Operands()

    def forward(x: "Tensor", *args: Any, **kwargs: Any) -> "Tensor":
        if module.disable_adapters or module.merged or args or kwargs:
            out: Tensor = peft_forward(x, *args, **kwargs)
            return out
        # An inactive dropout is the identity, which returns the same tensor.
        dropped = dropout(x)
        together = shared.output(module, x) if shared is not None and dropped is x else None
        if together is not None:
            return together
        if whole:
            return adapted_linear(x, dropped, _tensors(module), operands, module.output_unread)
        return add_low_rank(base(x), dropped, _tensors(module), operands)

    return forward
