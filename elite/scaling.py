"""How the learning rate follows the size of the batch. Plain arithmetic.

With B tokens in an optimizer step, and a rate η₀ that was found for B₀ of them:

    linear    η = η₀ · B / B₀      plain SGD: Goyal et al. 2017, arXiv:1706.02677
    sqrt      η = η₀ · √(B / B₀)   keeps the variance of an update: Krizhevsky 2014, arXiv:1404.5997; for Adam, whose updates have
                                   that of the gradient divided out, Malladi et al. 2022, arXiv:2205.10287
"""

import math
from enum import Enum


class LrScaling(Enum):
    """How the learning rate follows the tokens of an optimizer step."""

    none = "none"
    sqrt = "sqrt"
    """By the square root: for Adam."""
    linear = "linear"


SOURCES = {
    LrScaling.none: "",
    LrScaling.sqrt: "Krizhevsky 2014; for Adam Malladi et al. 2022",
    LrScaling.linear: "Goyal et al. 2017",
}


def scaled_rate(rate: float, scaling: LrScaling, tokens: int, reference_tokens: int) -> float:
    """The learning rate for a step of `tokens`, where `rate` is meant for `reference_tokens`."""
    ratio = tokens / reference_tokens
    return rate * {LrScaling.none: 1.0, LrScaling.sqrt: math.sqrt(ratio), LrScaling.linear: ratio}[scaling]


def scaling_words(rate: float, scaling: LrScaling, tokens: int, reference_tokens: int) -> str:
    """Formula, value and source, for people."""
    if scaling is LrScaling.none:
        return f"{rate:.3g}, whatever the batch"
    quotient = f"{tokens:,} / {reference_tokens:,}"
    formula = f"√({quotient})" if scaling is LrScaling.sqrt else quotient
    return f"{scaled_rate(rate, scaling, tokens, reference_tokens):.3g} = {rate:.3g} × {formula} ({scaling.value}: {SOURCES[scaling]})"
