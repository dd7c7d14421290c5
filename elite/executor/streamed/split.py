"""The backward of one layer on one chunk in two parts: above its attention, and below it. Between them ranks meet (rounds.py).

The layer is a function of its input h by way of queries, keys and values, and of what other ranks make of those: out = f(h, O). Above:
∂out/∂h at a given O, and dO. Below: dQ, dK, dV through the projections alone. Both add up to the gradient of h, and of each parameter.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from elite.executor.streamed.attention import KeysKnown, Work

Layer = Callable[[Tensor, Work], Tensor]
"""One layer on one chunk, [n, d] → [n, d], with what its attention needs to know."""
Gradients = Sequence[Tensor | None]


def project(layer: Layer, hidden: Tensor, work: Work) -> bool:
    """Call a layer until its queries, keys and values are in `work`; False if they never are."""
    try:
        layer(hidden, work)
    except KeysKnown:
        return True
    return False


def above(
    layer: Layer, hidden: Tensor, work: Work, upstream: Tensor, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Tensor, Gradients]:
    """The first part of dh [n, d], dO [n, H, D] and the parts of the parameters' gradients.

    Args:
        work: has O as `kept`; has queries, keys and values as `projected` afterwards.
    """
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        out = layer(hidden, work)
    assert work.leaf is not None
    of_hidden, do, *rest = torch.autograd.grad(out, [hidden, work.leaf, *parameters], upstream, allow_unused=True)
    return (
        torch.zeros_like(hidden) if of_hidden is None else of_hidden,
        torch.zeros_like(work.leaf) if do is None else do,
        rest,
    )


def below(
    layer: Layer, hidden: Tensor, work: Work, upstream: Sequence[Tensor], parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Gradients]:
    """The second part of dh [n, d] and of the parameters' gradients, from dQ, dK and dV."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        project(layer, hidden, work)
    assert work.projected is not None
    of_hidden, *rest = torch.autograd.grad(work.projected, [hidden, *parameters], upstream, allow_unused=True)
    assert of_hidden is not None
    return of_hidden, rest
