"""Cases of the operations between a layer's linear maps: norms, rotary embedding, activations, the residual stream."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elite.bench.kernel_case import BOTH, DTYPE, FORWARD, Call, Case, Geometry, total, values


def norm(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """Root-mean-square norm, for Phi layer norm, with frozen weights."""
    x = values(tokens, g.hidden, device=device)
    weight, bias = _weights(g, device)

    def eager(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _eager_norm(g, x, weight, bias)

    def ours() -> Call:
        from elite.kernels.norm.kernel import norm

        return lambda x, weight, bias: norm(x, weight, bias, g.eps, g.phi)[0]

    def reference() -> Call:
        from elite.kernels.norm.reference import norm

        return lambda x, weight, bias: norm(x, weight, bias, g.eps, g.phi)[0]

    def liger() -> Call:
        if g.phi:
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, g.eps)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x, weight, _: LigerRMSNormFunction.apply(x, weight, g.eps)

    there = 2 * total(x) + total(weight, bias)
    moved = {FORWARD: there, BOTH: there + 3 * total(x) + total(weight)}
    yield Case("norm", g, tokens, (x, weight, bias), reference, eager, ours, others={"liger": liger}, moved=moved)


def add_norm(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """The norm of a sum, and the sum."""
    x, residual = (values(tokens, g.hidden, device=device) for _ in range(2))
    weight, bias = _weights(g, device)

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        h = x + residual
        return _eager_norm(g, h, weight, bias), h

    def ours() -> Call:
        from elite.kernels.norm.kernel import norm

        return lambda x, residual, weight, bias: norm(x, weight, bias, g.eps, g.phi, residual=residual)

    def reference() -> Call:
        from elite.kernels.norm.reference import norm

        return lambda x, residual, weight, bias: norm(x, weight, bias, g.eps, g.phi, residual=residual)

    def liger() -> Call:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return lambda x, residual, weight, _: LigerFusedAddRMSNormFunction.apply(x, residual, weight, g.eps)

    there = 4 * total(x) + total(weight, bias)
    # Both inputs have the same gradient.
    moved = {FORWARD: there, BOTH: there + 4 * total(x) + total(weight)}
    others = {} if g.phi else {"liger": liger}
    yield Case("add_norm", g, tokens, (x, residual, weight, bias), reference, eager, ours, others=others, moved=moved)


def rotary(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """Rotary embedding of queries and keys [1, tokens, heads, head dimension], of the first values of each head for Phi."""
    q, k = (values(1, tokens, heads, g.head_dim, device=device) for heads in (g.heads, g.kv_heads))
    frequencies = 10000.0 ** -(torch.arange(0, g.rotary, 2, device=device) / g.rotary)
    angles = torch.outer(torch.arange(tokens, device=device), frequencies).repeat(1, 2)[None]
    cos, sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)

    def ours() -> Call:
        from elite.kernels.rotary.kernel import rotary

        # As attention's gradients are; the bench's own may be written to likewise.
        return lambda q, k, cos, sin: rotary(_made(q), _made(k), cos, sin, spend=True)

    def reference() -> Call:
        from elite.kernels.rotary.reference import rotary

        return rotary

    def liger() -> Call:
        from liger_kernel.ops.rope import LigerRopeFunction

        def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
            turned = LigerRopeFunction.apply(_made(q).transpose(1, 2), _made(k).transpose(1, 2), cos, sin)
            return tuple(t.transpose(1, 2) for t in turned)

        return call

    # In place, so only what turns; both halves of the angles are alike.
    there = 2 * (total(q, k) * g.rotary // g.head_dim) + total(cos, sin) // 2
    moved = {FORWARD: there, BOTH: 2 * there}
    eager, others = _eager_rotary(g.rotary), {"liger": liger}
    yield Case("rotary", g, tokens, (q, k, cos, sin), reference, eager, ours, others=others, moved=moved, in_place=True)


def swiglu(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """SiLU of the gate times up."""
    if g.phi:
        return
    gate, up = (values(tokens, g.mlp, device=device) for _ in range(2))

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def ours() -> Call:
        from elite.kernels.gate.kernel import swiglu

        return swiglu

    def reference() -> Call:
        from elite.kernels.gate.reference import swiglu

        return swiglu

    def liger() -> Call:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply

    moved = {FORWARD: 3 * total(gate), BOTH: 8 * total(gate)}
    yield Case("swiglu", g, tokens, (gate, up), reference, eager, ours, others={"liger": liger}, moved=moved)


def gelu(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """GELU in its tanh form: several operations in transformers, one of torch's own as `eager_fused`."""
    from transformers.activations import NewGELUActivation

    if not g.phi:
        return
    x = values(tokens, g.mlp, device=device)

    def ours() -> Call:
        from elite.kernels.gate.kernel import gelu_tanh

        return gelu_tanh

    def reference() -> Call:
        from elite.kernels.gate.reference import gelu_tanh

        return gelu_tanh

    def fused() -> Call:
        return lambda x: F.gelu(x, approximate="tanh")

    moved = {FORWARD: 2 * total(x), BOTH: 5 * total(x)}
    yield Case("gelu", g, tokens, (x,), reference, NewGELUActivation(), ours, others={"eager_fused": fused}, moved=moved)


def residual(g: Geometry, tokens: int, device: torch.device) -> Iterator[Case]:
    """What attention and MLP give, after dropout, added to the residual stream. Results are compared without dropout: masks are random."""
    if not g.dropout:
        return
    x, attention, mlp = (values(tokens, g.hidden, device=device) for _ in range(3))

    def eager(x: Tensor, attention: Tensor, mlp: Tensor, p: float) -> Tensor:
        return F.dropout(attention, p) + F.dropout(mlp, p) + x

    def ours() -> Call:
        from elite.kernels.residual.kernel import add_dropped

        return lambda x, attention, mlp, p: add_dropped(x, (attention, mlp), p)

    def reference() -> Call:
        from elite.kernels.residual.reference import add_dropped

        return lambda x, attention, mlp, p: add_dropped(x, (attention, mlp), p)

    # Masks can be drawn again, and the stream's own gradient is what arrives.
    moved = {FORWARD: 4 * total(x), BOTH: 7 * total(x)}
    yield Case("residual", g, tokens, (x, attention, mlp, g.dropout), reference, eager, ours, moved=moved, checked={3: 0.0})


def _weights(g: Geometry, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Weight, and bias where the model has one; frozen."""
    weight = values(g.hidden, device=device, trained=False)
    return weight, values(g.hidden, device=device, trained=False) if g.phi else None


def _eager_norm(g: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As transformers' models compute it."""
    if g.phi:
        return F.layer_norm(x, x.shape[-1:], weight, bias, g.eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + g.eps)
    return weight * wide.to(x.dtype)


def _eager_rotary(width: int) -> Call:
    """As transformers' attention does it, on [1, heads, tokens, head dimension] views; Phi's turns a part of each head."""
    from transformers.models.phi.modeling_phi import apply_rotary_pos_emb

    def eager(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if width == q.shape[-1]:
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        else:
            turned = apply_rotary_pos_emb(q[..., :width], k[..., :width], cos, sin)
            q, k = (torch.cat([t, x[..., width:]], -1) for t, x in zip(turned, (q, k), strict=True))
        return q.transpose(1, 2), k.transpose(1, 2)

    return eager


class _Made(torch.autograd.Function):
    """The same values in the same place, as the output of an operation: autograd lets nobody write to a leaf."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        return upstream[0]


def _made(x: Tensor) -> Tensor:
    made: Tensor = _Made.apply(x)
    return made
