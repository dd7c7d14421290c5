"""Sequence packing.

What:   several documents share one sequence, so that no token slot is padding.
How:    best-fit packing of documents into sequences of the context; attention and loss stay inside a document and positions
        restart, so every document sees exactly what it would see alone.
Memory: the attention's outputs, one document's each, are put together: one copy more of them is kept.
Source: Krell et al. 2021, arXiv:2107.02027; Ding et al. 2024, arXiv:2404.10830.
"""

from dataclasses import replace
from typing import ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step
from elite.optimizations.targets import BatchLayout


class SequencePacking(Optimization):
    """See the module's docstring."""

    name = "sequence_packing"
    title = "sequence packing"
    row = 43
    stage = Stage.data
    # Same documents, same mathematics inside each; they only meet in other batches.
    exactness = Exactness.APPROX
    claims: ClassVar[frozenset[Site]] = frozenset({Site.BATCH_LAYOUT})
    source = "Krell et al. 2021; Ding et al. 2024"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return replace(step, form=replace(step.form, packed=True))

    def apply(self, target: BatchLayout) -> Applied:
        before = target.packed
        target.packed = True

        def undo() -> None:
            target.packed = before

        return Applied(1, "batch layout", undo)
