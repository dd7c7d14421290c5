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
from elite.optimizations.parts import FP32, Part, Sizes, let_go, unpacked
from elite.optimizations.shapes import ALIGNMENT, adapter_rank

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
        # A quantised base is no function of siblings.
        copies = (facts.trainable_params + (0 if step.map_at_work else _zeros(facts))) * step.value
        standing = replace(step.standing, trainable_copy=step.standing.trainable_copy + copies)
        return replace(step, standing=standing, form=replace(step.form, maps=fused_maps))

    def apply(self, target: Any) -> Applied:
        from peft.tuners.lora import LoraLayer

        adapted: list[Any] = [module for module in target.modules() if isinstance(module, LoraLayer)]
        plain = [module for module in adapted if _is_plain(module)]
        maps = {id(module): _Adapted(module) for module in plain}
        shared = {map_: group for group in _groups(target, maps) for map_ in group.maps}
        for module in plain:
            map_ = maps[id(module)]
            # The instance's attribute hides the class's method, so nothing but this model changes.
            module.forward = _forward(map_, shared.get(map_))
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
    if s.packed:
        return _added_maps(s, maps, read, kept)
    rank, into, tokens = adapter_rank(s.facts), maps[0].inputs, s.tokens
    ranks, outputs = rank * len(maps), [m.outputs for m in maps]
    if len(maps) > 1 and ranks % ALIGNMENT:
        # Each map alone, and no product in one. Gradients of the input are added up, when nobody reads the last map's any more.
        ahead, back = 0, 2 * into * tokens - outputs[-1] * tokens
    elif len(maps) > 1:
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
    gradients = FP32 * rank * sum(into + out for out in outputs)
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
        work=max(s.value * back - (read - s.value) * into * tokens, converted) + ranks * s.value * tokens + gradients,
        gradients=gradients,
    )


def _added_maps(s: Sizes, maps: Sequence[LinearShape], read: float, kept: bool) -> Part:
    """Maps whose packed base keeps its own function, and another adds the adapter's product to what that gives."""
    rank, into, tokens = adapter_rank(s.facts), maps[0].inputs * s.tokens, s.tokens
    low, returned = len(maps) * rank * s.value * tokens, sum(m.outputs for m in maps) * s.value * tokens
    converted, own = (s.value if read != s.value else 0) * into, 0 if kept else into * read
    gradients, last = FP32 * rank * sum(m.inputs + m.outputs for m in maps), maps[-1].outputs * s.value * s.tokens
    # The input's gradient through the base beside that through the adapter, then their sum, when nobody reads the map's output gradient any
    # more; nor the input, if it is its only map's.
    through = max(s.value * into + unpacked(s, maps), 2 * read * into - let_go(s, maps))
    return Part(
        "maps",
        saved=own + low,
        small=low,
        forward=returned + max(unpacked(s, maps), last) + converted,
        arrives=returned,
        lets_go=True,
        leaves=into * read,
        keeps_input=True,
        work=through - (own if len(maps) == 1 else 0) + low + gradients,
        gradients=gradients,
    )


def _copied(inner: int, rows: int, columns: int, rank: int) -> int:
    """Values that one product instead of two copies (`_sum_of_products`)."""
    return (inner + rank) * (rows + columns) if inner * (rows + columns) < rows * columns and rank % ALIGNMENT == 0 else 0


def _zeros(facts: Facts) -> int:
    """Zeros beside the B's of siblings that are one function, all layers: each has room for the values of all."""
    outputs = {linear.name.rsplit(".", 1)[-1]: linear.outputs for linear in facts.model.layer_linears}
    rank = adapter_rank(facts)
    together = [names for names in SIBLINGS if outputs.keys() >= set(names) and rank * len(names) % ALIGNMENT == 0]
    groups = [[outputs[name] for name in names] for names in together]
    return facts.model.num_hidden_layers * rank * sum((len(group) - 1) * sum(group) for group in groups)


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


class _Adapted:
    """An adapted linear map and its parts, which to look up at every call would take as long as to launch a product."""

    def __init__(self, module: Any) -> None:
        from torch import nn

        from elite.optimizations.functions.lora import Operands

        name = module.active_adapters[0]
        self.module, self.base, self._name = module, module.base_layer, name
        self._a, self._b, self._dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        self._drops = not isinstance(self._dropout, nn.Identity)
        self.operands = Operands()

    @property
    def map(self) -> "AdaptedMap":
        """Its tensors, as they are now."""
        from elite.optimizations.functions.lora import AdaptedMap

        return AdaptedMap(self.base.weight, self.base.bias, self._a.weight, self._b.weight, self.module.scaling[self._name])

    @property
    def rank(self) -> int:
        """Of its adapter."""
        return len(self._a.weight)

    def dropped(self, x: "Tensor") -> "Tensor":
        """x after dropout; the same tensor where there is none."""
        # An inactive dropout is the identity, which returns the same tensor.
        out: Tensor = self._dropout(x) if self._drops else x
        return out

    def alone(self) -> bool:
        """Whether nothing but x and the map's own matrices determines what it returns."""
        module, drops = self.module, self._drops and self._dropout.training and self._dropout.p
        return not (module.disable_adapters or module.merged or module.output_unread or drops)


class _SharedInput:
    """Sibling maps that are called on one tensor, one after another: the call of the first computes all.

    Args:
        maps: in the order in which they are called.
    """

    def __init__(self, maps: list[_Adapted]) -> None:
        from elite.optimizations.functions.lora import Operands

        self.maps = maps
        self._operands = Operands()
        self._input: Any = None
        self._state: tuple[object, ...] = ()
        self._outputs: dict[_Adapted, Tensor] = {}

    def output(self, adapted: _Adapted, x: "Tensor") -> "Tensor | None":
        """The output of one of the maps, None if it has to be computed on its own."""
        from elite.optimizations.functions.lora import adapted_linears

        state = _state(x)
        if adapted is self.maps[0] and all(map_.alone() for map_ in self.maps):
            outputs = adapted_linears(x, [map_.map for map_ in self.maps], self._operands)
            self._outputs = dict(zip(self.maps, outputs, strict=True))
            self._input, self._state = x, state
        elif self._input is not x or self._state != state:
            return None
        out = self._outputs.pop(adapted, None)
        if not self._outputs:
            self._input = None
        return out


def _state(x: "Tensor") -> tuple[object, ...]:
    """Two calls with the same tensor and the same of this give the same output."""
    import torch

    return torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type), None if x.is_inference() else x._version


def _groups(target: Any, adapted: dict[int, _Adapted]) -> list[_SharedInput]:
    """Siblings among the whole maps of `adapted`, by their modules' identities, that a decoder layer calls on one tensor."""
    found = []
    for parent in target.modules():
        for names in SIBLINGS:
            maps = [adapted.get(id(getattr(parent, name, None))) for name in names]
            whole = [map_ for map_ in maps if map_ is not None and _is_whole(map_.module)]
            if len(whole) == len(names) and sum(map_.rank for map_ in whole) % ALIGNMENT == 0:
                found.append(_SharedInput(whole))
    return found


def _forward(adapted: _Adapted, shared: _SharedInput | None) -> Callable[..., "Tensor"]:
    """The forward that replaces the module's; where the adapter is off or merged, or more is asked, peft's own answers."""
    from elite.optimizations.functions.lora import adapted_linear, add_low_rank

    module, base, peft_forward = adapted.module, adapted.base, adapted.module.forward
    whole = _is_whole(module)

    def forward(x: "Tensor", *args: Any, **kwargs: Any) -> "Tensor":
        if module.disable_adapters or module.merged or args or kwargs:
            out: Tensor = peft_forward(x, *args, **kwargs)
            return out
        dropped = adapted.dropped(x)
        together = shared.output(adapted, x) if shared is not None and dropped is x else None
        if together is not None:
            return together
        if whole:
            return adapted_linear(x, dropped, adapted.map, adapted.operands, module.output_unread)
        return add_low_rank(base(x), dropped, adapted.map, adapted.operands)

    return forward
