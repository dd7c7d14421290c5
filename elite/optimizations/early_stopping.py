"""Early stopping.

What:   the run ends once validation has stopped improving.
How:    after `patience` validations in a row whose loss is not below the best by more than `min_delta` (nats a token). Nothing is put
        back: the checkpoint of the best validation is kept anyway (`best_step`), `final/` holds the last weights.
Memory: nothing.
Source: Prechelt 1998, Early Stopping - But When?
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step
from elite.optimizations.hooks import Hook
from elite.optimizations.options import require
from elite.optimizations.targets import LoopBuild


class EarlyStopping(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        patience: int = 3
        """Validations without improvement."""
        min_delta: float = 0.0
        """Less than this is none."""

        def __post_init__(self) -> None:
            require("early_stopping.patience", self.patience, self.patience >= 1, "must be at least 1")
            require("early_stopping.min_delta", self.min_delta, 0 <= self.min_delta < float("inf"), "must not be negative, and finite")

    name = "early_stopping"
    title = "early stopping"
    row = 20
    stage = Stage.loop
    exactness = Exactness.EXACT
    claims: ClassVar[frozenset[Site]] = frozenset({Site.LAST_STEP})
    source = "Prechelt 1998"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: LoopBuild) -> Applied:
        chances = max(0, target.validations - self.config.patience)
        undo = target.add(Patience(self.config.patience, self.config.min_delta))
        return Applied(chances, f"of {target.validations} validations may end the run, patience {self.config.patience}", undo)


class Patience(Hook):
    """Counts validations in a row without improvement."""

    name = EarlyStopping.name

    def __init__(self, patience: int, min_delta: float) -> None:
        self._patience, self._min_delta = patience, min_delta
        self._best = float("inf")
        self._idle = 0
        self._seen = 0

    def validated(self, step: int, losses: dict[str, float]) -> bool:
        loss = losses["val_loss"]
        self._seen += 1
        self._idle = 0 if loss < self._best - self._min_delta else self._idle + 1
        if self._idle == 0:
            self._best = loss
        return self._idle >= self._patience

    def state(self) -> dict[str, Any]:
        return {"best": self._best, "idle": self._idle, "seen": self._seen}

    def load_state(self, state: dict[str, Any]) -> None:
        self._best, self._idle, self._seen = state["best"], state["idle"], state["seen"]

    def counts(self) -> dict[str, float]:
        return {"validations": self._seen, "without_improvement": self._idle, "patience": self._patience}
