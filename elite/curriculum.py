"""In which order and at which lengths sequences are seen: the options of the `curriculum` group."""

from dataclasses import dataclass, field
from enum import Enum


class Curriculum(Enum):
    """In which order and at which lengths sequences are seen."""

    none = "none"
    difficulty = "difficulty"
    """Easy sequences first (Bengio et al. 2009)."""
    context = "context"
    """Short rows first: the context grows by stages."""


class Measure(Enum):
    """What makes a sequence difficult."""

    length = "length"
    """The length of the documents (`data.unit`) that its text is from."""
    loss = "loss"
    """The untrained model's loss on the files that its text is from, scored once before training."""


class Pacing(Enum):
    """How the open share of the corpus grows (elite/data/course.py)."""

    linear = "linear"
    root = "root"
    """Fast at first, and slower the more is open."""


@dataclass(frozen=True)
class CurriculumConfig:
    """In which order and at which lengths sequences are seen. Fractions are of all steps."""

    name: Curriculum = Curriculum.none
    shares: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])
    """`context`: the context of each stage as a share of the tier's, one over a whole number; the last is 1."""
    until: list[float] = field(default_factory=lambda: [0.3, 0.6])
    """`context`: where each stage but the last ends, as a fraction."""
    measure: Measure = Measure.length
    """`difficulty`: by what."""
    pacing: Pacing = Pacing.root
    """`difficulty`: how fast more of the corpus opens."""
    start_fraction: float = 0.1
    """`difficulty`: share of the corpus, the easiest, that is open at the first step."""
    full_at: float = 0.5
    """`difficulty`: when all of it is open, as a fraction."""
