"""What the stages hand to `apply`: small mutable builders with the state of an unoptimized run as defaults."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from elite.optimizations.hooks import Hook


@dataclass
class BatchLayout:
    """Stage `data`: how documents become sequences."""

    packed: bool = False
    """Several documents share a sequence; otherwise each is padded on its own."""
    mapped: bool = False
    """Tokens are read where they lie on disk; otherwise all are read into memory first."""


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
    model: Any = None
    """What is trained, for those who ask a parameter's name."""


@dataclass
class LoopBuild:
    """Stage `loop`: what a run's steps are made of, and what acts around them."""

    executor: Any
    """Carries out training passes; validation has another. Its `label_smoothing` is 0.0."""
    optimizer: Any
    """With the schedule's initial rates."""
    parameters: list[Any]
    """All that is trained."""
    steps: int
    """Of the whole run."""
    validations: int
    """After the one before the first step."""
    seed: int
    device: Any
    """Where it trains."""
    rehearse: Callable[[], float]
    """Carries a pass over random tokens of the run's shape through, leaves no trace, and returns its seconds."""
    hooks: list[Hook] = field(default_factory=list)

    def add(self, hook: Hook) -> Callable[[], None]:
        """Append a hook; what is returned removes it."""
        self.hooks.append(hook)
        return lambda: self.hooks.remove(hook)


@dataclass
class GenerationBuild:
    """Stage `generation`: how keys and values are kept while text is generated."""

    page: int | None = None
    """Tokens of a page; None: each sequence has its own, in one piece."""
    piece: int = 0
    """Tokens of a prompt that are read at once; without pages always all of them."""
