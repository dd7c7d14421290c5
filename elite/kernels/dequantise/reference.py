"""What the kernel computes, in plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 64
"""Weights that share a scale."""
COARSE = 256
"""Scales in 8 bits that share one in fp32."""


class Packed(NamedTuple):
    """A matrix [out, in] in four bits with double quantisation (Dettmers et al. 2023, arXiv:2305.14314), as bitsandbytes lays it out.

    w[e] = code[q[e]] · (scales[s[b]] · coarse[b // 256] + offset),  b = e // 64;  everything is fp32 but the bytes.
    """

    q: Tensor
    """[out · in / 2] bytes, the earlier weight in the upper half."""
    code: Tensor
    """[16], what four bits stand for."""
    s: Tensor
    """[out · in / 64] bytes."""
    scales: Tensor
    """[256], what a byte of `s` stands for."""
    coarse: Tensor
    """[⌈out · in / 64 / 256⌉]."""
    offset: Tensor
    """[], the mean of all scales."""


def dequantised(packed: Packed, out: Tensor) -> Tensor:
    """The matrix in `out` [out, in], whose rows may lie apart; computed in fp32. `in` is a multiple of 64."""
    q = packed.q.flatten().int()
    values = packed.code[torch.stack([q >> 4, q & 15], -1)].view(-1, BLOCK)
    coarse = packed.coarse.repeat_interleave(COARSE)[: len(values)]
    scale = packed.scales[packed.s.flatten().int()] * coarse + packed.offset
    return out.copy_((values * scale[:, None]).view(out.shape))
