"""Kernel warm-up.

What:   one forward and backward pass on random tokens before the first step, so that the first step's time is a step's.
How:    the run's own executor and shapes; kernels are compiled or read from the disk's cache, libraries choose theirs, the allocator
        takes its memory. Gradients are discarded, random states put back. The preflight does this too where it carries a whole pass
        through: not for one long row under the streamed executor, and not on a CPU unless asked. Here it is certain and counted; it
        takes as long as a pass.
Memory: a step's, less the optimizer's state.
Source: torch.utils.benchmark warms up so; Triton compiles at the first call with a shape.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step
from elite.optimizations.hooks import Hook
from elite.optimizations.targets import LoopBuild


class KernelWarmup(Optimization):
    """See the module's docstring."""

    name = "kernel_warmup"
    title = "kernel warm-up"
    row = 30
    stage = Stage.loop
    exactness = Exactness.EXACT
    claims: ClassVar[frozenset[Site]] = frozenset({Site.FIRST_PASS})
    source = "Triton"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: LoopBuild) -> Applied:
        return Applied(1, "pass before the first step", target.add(Warmup(target.rehearse, target.device.type == "cuda")))


class Warmup(Hook):
    """Rehearses a pass and remembers what that took.

    Args:
        rehearse: carries a pass through without a trace and returns its seconds.
        compiles: Triton kernels run here.
    """

    name = KernelWarmup.name

    def __init__(self, rehearse: Callable[[], float], compiles: bool) -> None:
        self._rehearse, self._compiles = rehearse, compiles
        self._counts: dict[str, float] = {"passes": 0}

    def begin(self) -> None:
        kernels = {"kernels_compiled": 0, "kernels_from_cache": 0}
        with _counted(kernels) if self._compiles else _uncounted():
            seconds = self._rehearse()
        self._counts = {"passes": 1, "pass_s": seconds, **kernels}

    def counts(self) -> dict[str, float]:
        return dict(self._counts)


@contextmanager
def _counted(kernels: dict[str, int]) -> Iterator[None]:
    """Count what Triton makes ready."""
    from triton import knobs

    def listener(*, cache_hit: bool, **_what: Any) -> None:  # Triton says much more
        kernels["kernels_from_cache" if cache_hit else "kernels_compiled"] += 1

    before = knobs.compilation.listener
    knobs.compilation.listener = listener
    try:
        yield
    finally:
        knobs.compilation.listener = before


@contextmanager
def _uncounted() -> Iterator[None]:
    yield
