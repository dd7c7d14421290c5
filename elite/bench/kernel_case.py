"""What a kernel is measured on: one operation on one model's geometry, and who offers it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from elite.compose import from_overrides
from elite.plan.words import gib

FORWARD = "forward"
"""As training runs it: what the backward needs is kept."""
BOTH = "forward+backward"
DTYPE = torch.bfloat16
MOST_EAGER = 0.4
"""Share of the device's memory that one tensor of an eager form may take: others of its size come on top."""

Call = Callable[..., Any]
"""Inputs to a tensor or a tuple of tensors."""
Make = Callable[[], Call]
"""Imports what the call needs, so that a missing library concerns nobody else."""


class NotMeasuredError(Exception):
    """A provider that is left out on purpose; its text says why."""


@dataclass(frozen=True)
class Geometry:
    """What kernels see of a model."""

    name: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    rotary: int
    """Values of a head that are rotated."""
    vocab: int
    eps: float
    phi: bool
    """Layer norms, GELU, biases everywhere, dropout before the residual stream; else RMS norms and SwiGLU."""
    dropout: float = 0.0
    q_bias: bool = False

    @property
    def head_dim(self) -> int:
        """Values of a head."""
        return self.hidden // self.heads


def geometry(name: str) -> Geometry:
    """Of a model in `conf/model`."""
    model = from_overrides(f"model={name}").config.model
    phi = model.model_type == "phi"
    rotated = model.rope_parameters.get("partial_rotary_factor", 1.0) * model.hidden_size / model.num_attention_heads
    return Geometry(
        name=name,
        hidden=model.hidden_size,
        mlp=model.intermediate_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        rotary=int(rotated),
        vocab=model.vocab_size,
        eps=model.extra["layer_norm_eps" if phi else "rms_norm_eps"],
        phi=phi,
        dropout=model.extra.get("resid_pdrop", 0.0),
        q_bias=phi or model.model_type == "qwen2",
    )


@dataclass(frozen=True)
class Case:
    """One operation on inputs of one size, with everyone who offers it."""

    op: str
    geometry: Geometry
    tokens: int
    inputs: tuple[Any, ...]
    """Tensors that require a gradient get one; others are as given."""
    reference: Make
    """Is called with half-precision inputs as fp32."""
    eager: Call
    """Plain torch, as transformers or peft has it."""
    ours: Make
    variant: str = ""
    """Which of several forms of the operation."""
    others: dict[str, Make] = field(default_factory=dict)
    compiles: bool = True
    """Whether the eager form is compiled too."""
    moved: dict[str, int] = field(default_factory=dict)
    """Bytes by pass, for operations that move data more than they compute: every input read once, every output written once."""
    passes: tuple[str, ...] = (FORWARD, BOTH)
    in_place: bool = False
    """Whether a provider may write to its inputs."""
    eager_bytes: int = 0
    """Of the largest tensor that the eager form makes, where that may be too large."""
    checked: dict[int, Any] = field(default_factory=dict)
    """Inputs by index that are others where results are compared: a dropout of 0."""

    @property
    def shape(self) -> list[list[int]]:
        """Sizes of the tensors that go in."""
        return [list(t.shape) for t in self.inputs if isinstance(t, Tensor)]

    @property
    def checked_inputs(self) -> tuple[Any, ...]:
        """With which results are compared."""
        return tuple(self.checked.get(i, value) for i, value in enumerate(self.inputs))

    def owned(self) -> "Case":
        """With inputs of its own where somebody may write to them."""
        if not self.in_place:
            return self
        copies = (t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in self.inputs)
        return replace(self, inputs=tuple(copies))

    def providers(self, device: torch.device) -> dict[str, Make]:
        """By name. A CPU, which has no Triton, compares the eager form and the reference: the harness, not the kernels."""
        eager: dict[str, Make] = {"eager": lambda: self._eager_if_it_fits(device)}
        if device.type == "cpu":
            return eager | {"reference": self.reference}
        compiled: dict[str, Make] = {"compile": lambda: torch.compile(self.eager, dynamic=False)}
        return {"elite": self.ours} | eager | (compiled if self.compiles else {}) | self.others

    def _eager_if_it_fits(self, device: torch.device) -> Call:
        if device.type == "cuda":
            there = torch.cuda.get_device_properties(device).total_memory
            if self.eager_bytes > MOST_EAGER * there:
                raise NotMeasuredError(f"a tensor of {gib(self.eager_bytes)} on a device of {gib(there)}")
        return self.eager


Cases = Callable[[Geometry, int, torch.device], Iterator[Case]]
"""All forms of an operation for a geometry, tokens and a device; none where the model does not have it."""


def values(*size: int, device: torch.device, scale: float = 1.0, trained: bool = True, dtype: torch.dtype = DTYPE) -> Tensor:
    """Normally distributed."""
    return (scale * torch.randn(size, device=device)).to(dtype).requires_grad_(trained)


def total(*tensors: Tensor | None) -> int:
    """Bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
