"""Forwards of decoder layers and of their attention, made of fused operations, and whether they do what the modules' own do.

An architecture is known by its parts, not by its name: a module gets a fused forward if it has the parts that this forward calls, and if
the two agree on a few tokens, tried with plain torch in place of kernels and with stand-ins for what the forward merely calls. So a model
that scales its residuals, norms after its blocks or rotates in another order keeps its own forward.

Shapes: hidden states [B, S, d]; H query heads, K key/value heads of D values; cos and sin [B, S, R].
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TRIAL = "elite_fused_trial"
"""Attention function under which attention modules are tried."""
TRIAL_TOKENS = 3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
HALF_TOLERANCE = 3e-2
"""Largest relative difference (2-norm) from the module's own forward; rounding alone stays far below, another formula does not."""
SEQUENTIAL = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
"""Parts of a layer whose MLP follows its attention: Llama's."""
PARALLEL = {"self_attn", "mlp", "input_layernorm", "resid_dropout"}
"""Parts of a layer whose attention and MLP read one norm: Phi's."""

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Operations:
    """What fused forwards are made of, with the signatures of `elite.kernels.*.reference`."""

    norm: Callable[..., tuple[Tensor, Tensor]]
    rotary: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    add_dropped: Callable[[Tensor, tuple[Tensor, ...], float], Tensor]


@dataclass(frozen=True)
class Norm:
    """A norm that the kernel can compute."""

    module: nn.Module
    eps: float
    center: bool

    @property
    def tensors(self) -> tuple[Any, Any]:
        """Weight and bias, as they are now."""
        return self.module.weight, getattr(self.module, "bias", None)


def kernels() -> Operations:
    """The Triton kernels."""
    from elite.kernels.norm.kernel import norm
    from elite.kernels.residual.kernel import add_dropped
    from elite.kernels.rotary.kernel import rotary

    # Attention makes the gradients of queries and keys for those who made them.
    return Operations(norm, partial(rotary, spend=True), add_dropped)


def references() -> Operations:
    """Plain torch."""
    from elite.kernels.norm.reference import norm
    from elite.kernels.residual.reference import add_dropped
    from elite.kernels.rotary.reference import rotary

    return Operations(norm, rotary, add_dropped)


def read_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the maps behind a norm read what it gives: autocast would convert it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype is torch.float32 else x.dtype


def fused_layer(layer: Any, norms: dict[nn.Module, Norm]) -> Forward | None:
    """A decoder layer's forward with fused sums, None if it is of another form.

    Args:
        norms: those that the kernel can compute.
    """
    parts = {name for name, _ in layer.named_children()}
    if parts == PARALLEL:
        return _parallel(layer, kernels()) if _holds(lambda: _layers_agree(layer, _parallel(layer, references()))) else None
    norm = norms.get(layer.post_attention_layernorm) if parts == SEQUENTIAL else None
    if norm is None:
        return None
    return _sequential(layer, norm, kernels()) if _holds(lambda: _layers_agree(layer, _sequential(layer, norm, references()))) else None


def _sequential(layer: Any, norm: Norm, operations: Operations) -> Forward:
    """h += attention(norm(h)); h += MLP(norm(h)): the first sum and the second norm are one."""

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        # Nothing here holds on to what the attention gave while the MLP is at work.
        normed, hidden_states = operations.norm(
            layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0],
            *(*norm.tensors, norm.eps, norm.center, hidden_states),
            dtype=read_dtype(hidden_states),
        )
        out: Tensor = hidden_states + layer.mlp(normed)
        return out

    return forward


def _parallel(layer: Any, operations: Operations) -> Forward:
    """h += dropout(attention(norm(h))) + dropout(MLP(norm(h))): both sums and dropouts are one."""

    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = layer.input_layernorm(hidden_states)
        attended, _ = layer.self_attn(hidden_states=normed, **kwargs)
        p = layer.resid_dropout.p if layer.training else 0.0
        return operations.add_dropped(hidden_states, (attended, layer.mlp(normed)), p)

    return forward


def _layers_agree(layer: Any, fused: Forward) -> bool:
    weight = layer.input_layernorm.weight
    x = _values(1, TRIAL_TOKENS, weight.numel()).to(weight)
    stand_ins: dict[nn.Module, Forward]
    stand_ins = {layer.self_attn: lambda hidden_states, **_: (hidden_states * 0.7 + 0.1, None), layer.mlp: lambda x: x * 0.3 - 0.2}
    stand_ins |= {child: _of_class(child) for name, child in layer.named_children() if name.endswith("layernorm")}
    training = layer.training
    # Dropout draws other values in both.
    layer.eval()
    try:
        with torch.no_grad(), _replaced(stand_ins):
            return _close(_of_class(layer)(x), fused(x))
    finally:
        layer.train(training)


def fused_attention(module: nn.Module) -> Forward | None:
    """The forward of an attention with separate projections and rotary embedding in place, None if it is of another form."""
    names = ("q_proj", "k_proj", "v_proj", "head_dim", "config")
    if not all(hasattr(module, name) for name in names) or not (hasattr(module, "o_proj") or hasattr(module, "dense")):
        return None
    if not {"hidden_states", "position_embeddings"} <= set(signature(type(module).forward).parameters):
        return None
    extras = dict[str, Any]()

    def agree() -> bool:
        own, seen = _own_attention(module)
        extras.update(seen.extras)
        return seen.plain and _close(own, _tried(module, _attention(module, references(), extras))[0])

    return _attention(module, kernels(), extras) if _holds(agree) else None


def _attention(module: Any, operations: Operations, extras: dict[str, Any]) -> Forward:
    """Projections, norms of heads where there are any, rotary embedding, the model's attention function, output map.

    Args:
        extras: what the module hands to its attention function besides tensors, in training.
    """
    q_norm = getattr(module, "q_norm", None) or getattr(module, "q_layernorm", None)
    k_norm = getattr(module, "k_norm", None) or getattr(module, "k_layernorm", None)
    at_rest = extras | ({"dropout": 0.0} if "dropout" in extras else {})
    out_map = "o_proj" if hasattr(module, "o_proj") else "dense"
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        q, k, v = (project(hidden_states).view(shape) for project in (module.q_proj, module.k_proj, module.v_proj))
        if q_norm is not None and k_norm is not None:
            q, k = q_norm(q), k_norm(k)
        q, k = operations.rotary(q, k, *position_embeddings)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, module.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
        # What the caller hands on wins: some modules name it among their own arguments.
        handed = (extras if module.training else at_rest) | kwargs
        attended, weights = attend(module, q, k, v, attention_mask, **handed)
        return getattr(module, out_map)(attended.reshape(*hidden_states.shape[:-1], -1)), weights

    return forward


@dataclass(frozen=True)
class _Seen:
    """What the attention function under trial was handed."""

    mask: Tensor | None
    extras: dict[str, Any]

    @property
    def plain(self) -> bool:
        """Whether the module hands on the mask it was given and, besides, numbers alone: no mask of its own, no attention sinks."""
        return self.mask is _MASK and not any(isinstance(value, Tensor) for value in self.extras.values())


def _own_attention(module: Any) -> tuple[Tensor, _Seen]:
    """What the module's own forward gives, and what it hands to its attention function in training."""
    training = module.training
    module.train()
    try:
        return _tried(module, _of_class(module))
    finally:
        module.train(training)


def _tried(module: Any, forward: Forward) -> tuple[Tensor, _Seen]:
    """The output of `forward` with made-up projections, angles and attention, and what this attention was handed."""
    config, dim = module.config, module.head_dim
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    device = next(module.parameters()).device
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    turned = getattr(module, "rotary_ndims", dim)
    x = _values(1, TRIAL_TOKENS, 1).to(device, dtype)
    projected = [_values(1, TRIAL_TOKENS, n * dim).roll(i).to(device, dtype) for i, n in enumerate((heads, kv_heads, kv_heads))]
    # As a rotary embedding gives them: both halves alike.
    angles = _values(1, TRIAL_TOKENS, turned // 2).repeat(1, 1, 2).to(device)
    out_map = module.o_proj if hasattr(module, "o_proj") else module.dense
    stand_ins: dict[nn.Module, Forward] = {child: _of_class(child) for name, child in module.named_children() if name.endswith("norm")}
    stand_ins[out_map] = lambda t: t
    for project, values in zip((module.q_proj, module.k_proj, module.v_proj), projected, strict=True):
        stand_ins[project] = lambda _, values=values: values.clone()
    function, config._attn_implementation = config._attn_implementation, TRIAL
    _HANDED.clear()
    try:
        with torch.no_grad(), _replaced(stand_ins):
            embeddings = (angles.cos().to(dtype), angles.sin().to(dtype))
            out: Tensor = forward(hidden_states=x, position_embeddings=embeddings, attention_mask=_MASK)[0]
    finally:
        config._attn_implementation = function
    # Nothing where the module has an attention of its own.
    return out, _HANDED[0] if _HANDED else _Seen(None, {})


_MASK = torch.zeros(1, 1, TRIAL_TOKENS, TRIAL_TOKENS)
"""Recognised by its identity."""
_HANDED: list[_Seen] = []
"""By the last trial; transformers calls an attention function by its name alone."""


def _trial_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Something that depends on every value: [B, H, S, D] → [B, S, H, D]."""
    _HANDED.append(_Seen(attention_mask, kwargs))
    groups = query.shape[1] // key.shape[1]
    mixed = query + 0.5 * key.repeat_interleave(groups, 1) + 0.25 * value.repeat_interleave(groups, 1)
    return mixed.transpose(1, 2).contiguous(), None


AttentionInterface.register(TRIAL, _trial_attention)


@contextmanager
def _replaced(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """These modules compute something else for a while."""
    installed: dict[Any, Forward | None] = {module: vars(module).get("forward") for module in forwards}
    for module, stand_in in forwards.items():
        module.forward = stand_in
    try:
        yield
    finally:
        for module, forward in installed.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _of_class(module: nn.Module) -> Forward:
    """A module's own forward: one installed already may be a kernel's, which needs a GPU, where the weights may not be yet."""
    return partial(type(module).forward, module)


def _values(*shape: int) -> Tensor:
    """The same every time, and without touching torch's random state."""
    count = torch.Size(shape).numel()
    return torch.linspace(-2.0, 3.0, count).sin().mul(7.0).cos().view(shape)


def _holds(trial: Callable[[], bool]) -> bool:
    """What the trial says; False where the module cannot even be called so."""
    try:
        return trial()
    except (RuntimeError, TypeError, ValueError, AttributeError):
        # Of another form: it norms whole projections (OLMo 2), takes complex angles (Llama 4), unpacks what its MLP returns (GPT-OSS).
        return False


def _close(own: Any, fused: Tensor) -> bool:
    if not isinstance(own, Tensor) or own.shape != fused.shape:
        return False
    limit = TOLERANCE.get(fused.dtype, HALF_TOLERANCE)
    return bool((own.double() - fused.double()).norm() <= limit * own.double().norm())
