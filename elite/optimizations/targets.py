"""What the stages hand to `apply`: small mutable builders with the state of an unoptimized run as defaults."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class BatchLayout:
    """Stage `data`: how documents become sequences."""

    packed: bool = False
    """Several documents share a sequence; otherwise each is padded on its own."""


@dataclass
class Runtime:
    """Stage `runtime`: dtypes by name, so that this module needs no torch."""

    supports_bf16: bool
    compute_dtype: str = "float32"
    """`float32`, `bfloat16` or `float16`: of matrix products and of frozen weights."""


@dataclass
class OptimizerBuild:
    """Stage `optimizer`: parameter groups, and who makes the optimizer."""

    groups: list[dict[str, Any]]
    """As torch optimizers take them."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """`lr`, `betas`, `eps`, `weight_decay`."""
    factory: Callable[..., Any] | None = None
    """Called with groups and arguments; None is torch's AdamW."""


@dataclass
class GenerationBuild:
    """Stage `generation`: how keys and values are kept while text is generated."""

    page: int | None = None
    """Tokens of a page; None: each sequence has its own, in one piece."""
    piece: int = 0
    """Tokens of a prompt that are read at once; without pages always all of them."""
