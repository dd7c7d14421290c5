"""Scheduled defragmentation.

What:   every so many steps the allocator's cache is emptied, so that memory held in pieces too small to use can be taken whole again.
How:    torch.cuda.empty_cache between two steps; reserved and allocated bytes before and after stand in `metrics.jsonl`, their sums in
        the summary. The next step takes its memory anew, which costs time.
Memory: what is allocated stays; what is reserved falls to it between those steps, and rises again in the next one.
Source: torch.cuda memory management.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.hooks import Hook
from elite.optimizations.options import require
from elite.optimizations.targets import LoopBuild


class Defragmentation(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        every: int = 50
        """Steps between two times."""

        def __post_init__(self) -> None:
            require("defragmentation.every", self.every, self.every >= 1, "must be at least 1")

    name = "defragmentation"
    title = "scheduled defragmentation"
    row = 32
    stage = Stage.loop
    exactness = Exactness.EXACT
    claims: ClassVar[frozenset[Site]] = frozenset({Site.ALLOCATOR_CACHE})
    source = "torch.cuda"

    def check(self, facts: Facts) -> str | None:
        return None if facts.device.kind == "cuda" else "a CPU's memory is not torch's to give back"

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: LoopBuild) -> Applied:
        undo = target.add(Emptying(self.config.every, target.device))
        return Applied(target.steps // self.config.every, f"times in {target.steps} steps", undo)


class Emptying(Hook):
    """Empties the cache and keeps account."""

    name = Defragmentation.name

    def __init__(self, every: int, device: Any) -> None:
        self._every, self._device = every, device
        self._last: dict[str, float] = {}
        self._counts: dict[str, float] = {"times": 0, "released_bytes": 0, "most_released_bytes": 0}

    def stepped(self, step: int) -> None:
        import torch

        self._last = {}
        if step % self._every:
            return
        allocated, reserved = torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        torch.cuda.empty_cache()
        after = torch.cuda.memory_reserved(self._device)
        self._last = {"defragmentation_allocated_bytes": allocated, "defragmentation_before_bytes": reserved}
        self._last["defragmentation_after_bytes"] = after
        self._counts["times"] += 1
        self._counts["released_bytes"] += reserved - after
        self._counts["most_released_bytes"] = max(self._counts["most_released_bytes"], reserved - after)

    def metrics(self) -> dict[str, float]:
        return self._last

    def state(self) -> dict[str, Any]:
        return dict(self._counts)

    def load_state(self, state: dict[str, Any]) -> None:
        self._counts = dict(state)

    def counts(self) -> dict[str, float]:
        return dict(self._counts)
