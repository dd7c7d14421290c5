"""Cases of the operations that matrix products dominate: the last linear map with its loss, and an adapted linear map."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elite.bench.kernel_case import BOTH, DTYPE, FORWARD, Call, Case, Geometry, Make, NotMeasuredError, values

REFERENCE_TOKENS = 1024
"""Whose fp32 logits the reference holds at once."""
RANK = 8
SCALING = 2.0


def linear_cross_entropy(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """The sum of losses of a head: forward without gradients, then with those of the hidden states, then with the head's too."""
    labels = torch.randint(g.vocab, (tokens,), device=device)
    for variant, passes in (("no gradients", (FORWARD,)), ("frozen head", (BOTH,)), ("trained head", (BOTH,))):
        trains = variant == "trained head"
        hidden = values(tokens, g.hidden, device=device, trained=BOTH in passes)
        weight = values(g.vocab, g.hidden, device=device, scale=g.hidden**-0.5, trained=trains)
        bias = values(g.vocab, device=device, trained=trains) if g.phi else None
        yield Case(
            *("linear_cross_entropy", g, tokens, (hidden, weight, bias, labels)),
            reference=lambda: _tiled,
            eager=_eager_loss,
            ours=_our_loss,
            variant=variant,
            others=_other_losses(g, trains),
            passes=passes,
            eager_bytes=4 * tokens * g.vocab,
        )


def lora(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """A frozen map in bf16 with an fp32 adapter under autocast, as a run has it: queries, and the MLP's first map."""
    for name, width, biased in (("q_proj", g.hidden, g.q_bias), ("fc1" if g.phi else "gate_proj", g.mlp, g.phi)):
        weight = values(width, g.hidden, device=device, scale=g.hidden**-0.5, trained=False)
        yield _adapted(g, tokens, name, weight, values(width, device=device, trained=False) if biased else None)


def _adapted(g: Geometry, tokens: int, name: str, weight: Tensor, bias: Tensor | None) -> Case:
    device = weight.device
    x = values(tokens, g.hidden, device=device)
    sizes = ((RANK, g.hidden), (len(weight), RANK))
    a, b = (nn.Parameter(values(*size, device=device, scale=size[1] ** -0.5, trained=False, dtype=torch.float32)) for size in sizes)

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        wide = x.float()
        return F.linear(wide, weight.float(), None if bias is None else bias.float()) + SCALING * F.linear(F.linear(wide, a), b)

    def ours() -> Call:
        from elite.optimizations.functions.lora import AdaptedMap, Operands, adapted_linear

        operands = Operands()

        return _autocast(lambda x, a, b: adapted_linear(x, x, AdaptedMap(weight, bias, a, b, SCALING), operands), device)

    eager = _autocast(_peft(weight, bias, a, b), device)
    return Case("lora", g, tokens, (x, a, b), lambda: plain, eager, ours, variant=name, passes=(BOTH,))


def _eager_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="sum")


def _our_loss() -> Call:
    from elite.losses import linear_cross_entropy

    return linear_cross_entropy


def _other_losses(g: Geometry, trains: bool) -> dict[str, Make]:
    """Liger, also with fp32 sums of the head's gradient, as ours are; cut-cross-entropy with its filter of small gradients and without."""

    def liger(**options: Any) -> Make:
        def make() -> Call:
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

            # In the order of its `forward`: class weights, index that is ignored, z-loss, smoothing, reduction, soft cap, return of z.
            fixed = (None, -100, 0.0, 0.0, "sum", None, False)
            return lambda hidden, weight, bias, labels: LigerFusedLinearCrossEntropyFunction.apply(
                hidden, weight, labels, bias, *fixed, options.get("sums")
            )[0]

        return make

    def cut(**options: Any) -> Make:
        def make() -> Call:
            from cut_cross_entropy import linear_cross_entropy

            if g.phi:
                raise NotMeasuredError("it takes no bias")
            return lambda hidden, weight, _, labels: linear_cross_entropy(hidden, weight, labels, reduction="sum", impl="cce", **options)

        return make

    wide = {"liger_fp32": liger(sums=torch.float32)} if trains else {}
    return {"liger": liger(), **wide, "cce": cut(), "cce_exact": cut(filter_eps=None)}


def _tiled(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """The loss, of which no more than a tile's logits exist at once, backward too."""

    def loss(part: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(part, weight, bias).float(), wanted, reduction="sum")

    tiles = zip(hidden.split(REFERENCE_TOKENS), labels.split(REFERENCE_TOKENS), strict=True)
    summed: Tensor = sum(checkpoint(loss, part, weight, bias, wanted, use_reentrant=False) for part, wanted in tiles)
    return summed


def _peft(weight: Tensor, bias: Tensor | None, a: nn.Parameter, b: nn.Parameter) -> Call:
    """peft's own layer around these tensors."""
    from peft import LoraConfig, inject_adapter_in_model

    holder = nn.Module()
    holder.add_module("map", nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype))
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["map"]), holder)
    layer: Any = holder.get_submodule("map")
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.base_layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    (name,) = layer.active_adapters
    layer.lora_A[name].weight, layer.lora_B[name].weight = a, b
    # As elite.model has it.
    layer.cast_input_dtype_enabled = False
    return lambda x, _a, _b: layer(x)


def _autocast(call: Call, device: torch.device) -> Call:
    def inside(x: Tensor, a: Tensor, b: Tensor) -> Any:
        with torch.autocast(device.type, DTYPE):
            return call(x, a, b)

    return inside
