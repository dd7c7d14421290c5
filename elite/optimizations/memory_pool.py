"""Growing memory segments.

What:   torch's allocator takes device memory in segments that grow page by page instead of blocks of fixed sizes.
How:    the allocator setting `expandable_segments`, set before the model is on the device. What the environment already says about the
        allocator stays. What is taken before the first step (`plan.take_ahead`) grows without it, too; weights do not, unless they are made
        at random and packed then.
Memory: what is allocated stays the same; what is reserved beyond it, and seen by the driver, shrinks to what pages round up.
Source: torch.cuda memory management, PYTORCH_CUDA_ALLOC_CONF.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
SETTING = "expandable_segments"


class MemoryPool(Optimization):
    """See the module's docstring."""

    name = "memory_pool"
    title = "growing memory segments"
    row = 31
    stage = Stage.runtime
    exactness = Exactness.EXACT
    claims: ClassVar[frozenset[Site]] = frozenset({Site.ALLOCATOR})
    source = "torch.cuda"

    def check(self, facts: Facts) -> str | None:
        if facts.device.kind != "cuda":
            return "a CPU's memory is not torch's to divide"
        name = given()
        return None if name is None else f"{name} says already how memory is taken"

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: Any) -> Applied:
        return Applied(1, "allocator", grow())


def given() -> str | None:
    """The environment's variable that says how memory is taken, if one does."""
    return next((name for name in VARIABLES if os.environ.get(name)), None)


def grow() -> Callable[[], None]:
    """Let segments from now on grow page by page; returns what ends it."""
    _set(True)
    return lambda: _set(False)


@contextmanager
def growing() -> Iterator[None]:
    """Within, segments grow page by page, whether the part is active or not, unless the environment says how they do. Not to be nested."""
    undo = grow() if given() is None else None
    try:
        yield
    finally:
        if undo is not None:
            undo()


def _set(on: bool) -> None:
    import torch

    # Its name since torch 2.9; the older one warns of it.
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    change(f"{SETTING}:{on}")
