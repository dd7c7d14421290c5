"""Attention kernels of libraries that give and take a log-sum-exp, and the table of all.

Formulas and shapes are those of `math_kernel`.

Source: Dao 2023, arXiv:2307.08691 (FlashAttention-2); Rabe and Staats 2021, arXiv:2112.05682 (memory-efficient); cuDNN's scaled dot
product attention.
"""

from abc import abstractmethod
from importlib import metadata
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from elite.executor.streamed.math_kernel import MATH, AttentionShape, Kernel, group_sum, merge

__all__ = ["KERNELS", "AttentionShape", "Kernel", "group_sum", "merge"]

aten = torch.ops.aten


class _Library(Kernel):
    """A fused kernel of a library, with the limits its `supports` answers from."""

    capability = (8, 0)
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    most_head_dim: ClassVar[int]
    windows: ClassVar[bool]

    def supports(self, shape: AttentionShape, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "runs on CUDA GPUs alone"
        missing = self._missing()
        if missing:
            return missing
        has = torch.cuda.get_device_capability(device)
        needs = max(self.capability, (8, 0)) if shape.dtype is torch.bfloat16 else self.capability
        kind = str(shape.dtype).removeprefix("torch.")
        if shape.dtype not in self.dtypes:
            return f"does not take {kind}"
        if has < needs:
            return f"needs compute capability {needs[0]}.{needs[1]} for {kind}; this GPU has {has[0]}.{has[1]}"
        if shape.head_dim % 8 or shape.head_dim > self.most_head_dim:
            return f"takes head dimensions that are multiples of 8 up to {self.most_head_dim}, not {shape.head_dim}"
        if shape.window is not None and not self.windows:
            return "has no sliding window"
        return None

    def _missing(self) -> str | None:
        """What is not there, if anything."""
        return None


class _Square(_Library):
    """A kernel whose causal mask is aligned top-left, right only for n = m: keys before the last n are attended apart."""

    windows = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
        assert window is None
        n, m = len(q), len(k)
        if min(n, m) == 1:
            # cuDNN takes neither one key nor, on some GPUs, one query.
            return MATH.forward(q, k, v, causal, None, scale)
        if not causal or n == m:
            return self._forward(q, k, v, causal, scale)
        before = self.forward(q, k[: m - n], v[: m - n], False, None, scale)
        return merge(*self.forward(q, k[m - n :], v[m - n :], True, None, scale), *before)

    def backward_by_head(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert window is None
        n, m = len(q), len(k)
        if min(n, m) == 1:
            return MATH.backward_by_head(do, q, k, v, o, lse, causal, None, scale)
        if not causal or n == m:
            return self._backward(do, q, k, v, o, lse, causal, scale)
        dq_before, dk_before, dv_before = self.backward(do, q, k[: m - n], v[: m - n], o, lse, False, None, scale)
        dq, dk, dv = self.backward(do, q, k[m - n :], v[m - n :], o, lse, True, None, scale)
        return dq.float() + dq_before, torch.cat([dk_before, dk]), torch.cat([dv_before, dv])

    @abstractmethod
    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """As `forward`, n = m if causal."""

    @abstractmethod
    def _backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `backward_by_head`, n = m if causal."""


class CuDNN(_Square):
    """cuDNN's attention, through torch."""

    name = "cudnn"
    most_head_dim = 128

    def _missing(self) -> str | None:
        if not torch.backends.cudnn.is_available():
            return "this torch has no cuDNN"
        return "has no deterministic backward" if torch.are_deterministic_algorithms_enabled() else None

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        o, lse, *_ = aten._scaled_dot_product_cudnn_attention(*map(_batch, (q, k, v)), None, True, 0.0, causal, False, scale=scale)
        return o[0].transpose(0, 1), lse.reshape(q.shape[1], len(q))

    def _backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # torch 2.11 caches cuDNN's graphs by the layouts of q, k and v alone: those of o and do must always be the same.
        tensors = [_batch(t) for t in (do.contiguous(), q, k, v, o.contiguous())]
        unused = lse.new_empty((), dtype=torch.int64)
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, lse.contiguous()[None, :, :, None], unused, unused, None, None, None, len(q), len(k), 0.0, causal, scale=scale
        )
        return dq[0].transpose(0, 1), dk[0].transpose(0, 1), dv[0].transpose(0, 1)


class Efficient(_Square):
    """The memory-efficient kernel of torch, which GPUs before Ampere have. The heads of a group are a batch row with shared keys."""

    name = "efficient"
    capability = (5, 0)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    most_head_dim = 256

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        (n, heads, _), kv_heads = q.shape, k.shape[1]
        step = n if causal else _EFFICIENT_KEYS
        out: tuple[Tensor, Tensor] | None = None
        for keys, values in zip(k.split(step), v.split(step), strict=True):
            o, lse, *_ = aten._scaled_dot_product_efficient_attention(
                *(_groups(q, kv_heads), _shared(keys, heads), _shared(values, heads), None, True, 0.0, causal), scale=scale
            )
            more = o.permute(2, 0, 1, 3).flatten(1, 2), lse.flatten(0, 1)[:, :n]
            out = more if out is None else merge(*out, *more)
        assert out is not None
        return out

    def _backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        (n, heads, _), kv_heads = q.shape, k.shape[1]
        # The kernel reads o as if the heads of one query lay together, and L in rows of multiples of 32.
        out = o.unflatten(1, (kv_heads, -1)).transpose(0, 1).contiguous().transpose(1, 2)
        logs = F.pad(lse, (0, -n % 32), value=torch.inf).unflatten(0, (kv_heads, -1)).contiguous()
        unused = lse.new_empty((), dtype=torch.int64)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            *(_groups(do, kv_heads), _groups(q, kv_heads), _shared(k, heads), _shared(v, heads), None, out, logs),
            *(unused, unused, 0.0, [True, True, True, False], causal),
            scale=scale,
        )
        return dq.permute(2, 0, 1, 3).flatten(1, 2), dk.flatten(0, 1).transpose(0, 1), dv.flatten(0, 1).transpose(0, 1)


_EFFICIENT_KEYS = 2**16
"""Keys in one call of the memory-efficient kernel, which counts elements in 32 bits."""


class Flash(_Library):
    """FlashAttention-2 as torch builds it in."""

    name = "flash"
    most_head_dim = 256
    windows = True
    reaches_back = True

    def _missing(self) -> str | None:
        return None if torch.backends.cuda.is_flash_attention_available() else "this torch is built without FlashAttention"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
        o, lse, *_ = aten._flash_attention_forward(
            *(q[None], k[None], v[None], None, None, len(q), len(k), 0.0, causal, False), scale=scale, **_band(window)
        )
        return o[0], lse[0]

    def backward_by_head(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The state of a random generator is read under dropout alone.
        state, unused = (lse.new_empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
        dq, dk, dv = aten._flash_attention_backward(
            *(do[None], q[None], k[None], v[None], o[None], lse.contiguous()[None], None, None, len(q), len(k), 0.0, causal),
            *(state, unused),
            scale=scale,
            **_band(window),
        )
        return dq[0], dk[0], dv[0]


class FlashAttn(_Library):
    """FlashAttention-2 of the optional flash-attn package."""

    name = "flash_attn"
    most_head_dim = 256
    windows = True
    reaches_back = True

    def _missing(self) -> str | None:
        try:
            version = metadata.version("flash-attn")
        except metadata.PackageNotFoundError:
            return "flash-attn is not installed"
        return None if tuple(int(part) for part in version.split(".")[:2]) >= (2, 7) else f"flash-attn {version} is older than 2.7"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_forward

        left, right = (-1, -1) if window is None else (window - 1, 0)
        o, lse, *_ = _flash_attn_forward(q[None], k[None], v[None], 0.0, scale, causal, left, right, 0.0, None, False)
        return o[0], lse[0]

    def backward_by_head(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        from flash_attn.flash_attn_interface import _flash_attn_backward

        left, right = (-1, -1) if window is None else (window - 1, 0)
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        tensors = [t[None] for t in (do, q, k, v, o, lse.contiguous(), dq, dk, dv)]
        deterministic = torch.are_deterministic_algorithms_enabled()
        _flash_attn_backward(*tensors, 0.0, scale, causal, left, right, 0.0, None, deterministic)
        return dq, dk, dv


def _band(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _batch(t: Tensor) -> Tensor:
    """[n, H, D] → [1, H, n, D], without a copy."""
    return t.transpose(0, 1)[None]


def _groups(t: Tensor, kv_heads: int) -> Tensor:
    """[n, H, D] → [K, G, n, D], without a copy."""
    return t.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _shared(t: Tensor, heads: int) -> Tensor:
    """[m, K, D] → [K, G, m, D], without a copy: the heads of a group read the same memory."""
    return t.transpose(0, 1)[:, None].expand(-1, heads // t.shape[1], -1, -1)


KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in (MATH, CuDNN(), Flash(), FlashAttn(), Efficient())}
