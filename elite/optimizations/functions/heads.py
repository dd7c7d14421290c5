"""Key/value heads pooled into fewer: averaged, or turned towards each other first and then averaged.

Shapes: K heads before, G after, g = K / G in a group, D head dimension, d hidden size, one more with a bias as last column.
"""

from typing import Any

import torch
from torch import Tensor, nn

ROUNDS = 20
"""Of alternating between the mean of a group and its heads' turns; each brings them closer."""


def convert(model: Any, kv_heads: int, aligned: bool, keys_turn: bool) -> tuple[int, bool]:
    """Pool the key and value heads of every layer of `model` to `kv_heads`; its configuration follows.

    Args:
        aligned: turn the heads of a group before they are averaged.
        keys_turn: the keys' heads too: turns that commute with a rotary embedding of halves.

    Returns:
        Projections that were pooled, and whether keys were turned.
    """
    config, layers = model.config, model.get_decoder().layers
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    count, turned = 0, False
    for layer in layers:
        attention = layer.self_attn
        keys_turn = keys_turn and not any("norm" in name for name, _ in attention.named_children())
        rotary = int(attention.head_dim * rope.get("partial_rotary_factor", 1.0)) if rope else 0
        if aligned:
            _align(attention, attention.head_dim, kv_heads, rotary if keys_turn else None)
            turned = keys_turn
        for name in ("k_proj", "v_proj"):
            projection = getattr(attention, name)
            pooled = _joined(projection, attention.head_dim).unflatten(0, (kv_heads, -1)).mean(1)
            setattr(attention, name, _split(pooled, projection))
            count += 1
        attention.num_key_value_groups = config.num_attention_heads // kv_heads
        if hasattr(attention, "num_key_value_heads"):
            attention.num_key_value_heads = kv_heads
    config.num_key_value_heads = kv_heads
    return count, turned


@torch.no_grad()
def _align(attention: Any, head_dim: int, groups: int, rotary: int | None) -> None:
    """Turn each group's heads towards its mean, without changing what the attention computes.

    Args:
        rotary: leading values of a head that the rotary embedding turns; None leaves keys as they are.
    """
    value = _joined(attention.v_proj, head_dim)
    heads = value.shape[0]
    turns = torch.cat([_turns(group) for group in value.chunk(groups)])
    _write(attention.v_proj, turns @ value)
    out = attention.o_proj if hasattr(attention, "o_proj") else attention.dense
    # [d, K, query heads that share one, D]: each reads its value's turn back.
    read = out.weight.float().unflatten(1, (heads, -1, head_dim))
    out.weight.copy_(torch.einsum("dkqi,kji->dkqj", read, turns).flatten(1))
    if rotary is None:
        return
    key = _joined(attention.k_proj, head_dim)
    turns = torch.cat([_commuting_turns(group, rotary) for group in key.chunk(groups)])
    _write(attention.k_proj, turns @ key)
    query = _joined(attention.q_proj, head_dim).unflatten(0, (heads, -1))
    _write(attention.q_proj, (turns[:, None] @ query).flatten(0, 1))


def _turns(heads: Tensor) -> Tensor:
    """Orthogonal turns [g, D, D] that bring heads [g, D, d] closest to their mean (Gower 1975)."""
    turns = torch.eye(heads.shape[1], dtype=heads.dtype, device=heads.device).repeat(len(heads), 1, 1)
    mean = heads[0]
    for _ in range(ROUNDS):
        left, _, right = torch.linalg.svd(mean @ heads.mT)
        turns = left @ right
        mean = (turns @ heads).mean(0)
    return turns


def _commuting_turns(heads: Tensor, rotary: int) -> Tensor:
    """As `_turns`, of those that commute with rotations of the values i and i + rotary / 2 against each other."""
    half = rotary // 2
    pairs = torch.complex(heads[:, :half], heads[:, half:rotary])
    phases, mean = torch.ones_like(pairs[..., :1]), pairs[0]
    for _ in range(ROUNDS):
        met = (mean * pairs.conj()).sum(-1, keepdim=True)
        phases = torch.where(met.abs() > 0, torch.sgn(met), 1)
        mean = (phases * pairs).mean(0)
    phases = phases[..., 0]
    turns = torch.zeros(*heads.shape[:2], heads.shape[1], dtype=heads.dtype, device=heads.device)
    first = torch.arange(half, device=heads.device)
    second = first + half
    turns[:, first, first] = turns[:, second, second] = phases.real
    turns[:, first, second], turns[:, second, first] = -phases.imag, phases.imag
    if rotary < heads.shape[1]:
        turns[:, rotary:, rotary:] = _turns(heads[:, rotary:])
    return turns


def _joined(projection: Any, head_dim: int) -> Tensor:
    """A projection's heads [K, D, d], or with its bias as last column [K, D, d + 1], in fp32."""
    weight = projection.weight.detach().float()
    if projection.bias is not None:
        weight = torch.cat([weight, projection.bias.detach().float()[:, None]], 1)
    return weight.unflatten(0, (-1, head_dim))


def _parts(heads: Tensor, projection: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the projection's dtype from what `_joined` made."""
    rows, dtype = heads.flatten(0, 1), projection.weight.dtype
    if projection.bias is None:
        return rows.to(dtype), None
    return rows[:, :-1].to(dtype), rows[:, -1].to(dtype)


def _write(projection: Any, heads: Tensor) -> None:
    weight, bias = _parts(heads, projection)
    projection.weight.copy_(weight)
    if bias is not None:
        projection.bias.copy_(bias)


def _split(heads: Tensor, projection: Any) -> nn.Linear:
    """A linear map like `projection` with these heads."""
    weight, bias = _parts(heads, projection)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), projection.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.contiguous(), projection.weight.requires_grad)
    return made.train(projection.training)
