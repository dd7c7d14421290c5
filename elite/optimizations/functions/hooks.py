"""Others' hooks on parameters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def hooks_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, tensor hooks do not fire: not on the gradient of each chunk, only on the sums that the Functions return."""
    hooked = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks
