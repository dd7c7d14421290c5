"""Memory-mapped data.

What:   training reads the tokenised corpus where it lies on disk; the system brings the pages that are touched, and drops them at will.
How:    numpy's memmap over the token file, read-only, so ranks of one machine share the pages. Off, each rank reads all of it into memory.
Memory: none of its own, instead of 2 bytes a token of the corpus (4 for vocabularies of 65,536 and more) of each rank in host memory.
Source: numpy.memmap; mmap(2).
"""

from dataclasses import replace
from typing import ClassVar

from elite.facts import Corpus, Facts, ModelShape
from elite.optimizations.contract import Applied, Exactness, Optimization, Site, Stage, Step
from elite.optimizations.targets import BatchLayout

SMALL_VOCABULARY = 1 << 16
"""A smaller one has tokens of two bytes."""


def corpus_bytes(step: Step, corpus: Corpus, model: ModelShape) -> float:
    """Host memory that one rank's tokens take. Bytes."""
    token = 2 if model.vocab_size < SMALL_VOCABULARY else 4
    return float(token * (corpus.train_tokens + corpus.val_tokens)) if step.corpus_resident else 0.0


class MemoryMappedData(Optimization):
    """See the module's docstring."""

    name = "memory_mapped_data"
    title = "memory-mapped data"
    row = 28
    stage = Stage.data
    exactness = Exactness.EXACT
    claims: ClassVar[frozenset[Site]] = frozenset({Site.CORPUS})
    source = "numpy.memmap"

    def check(self, facts: Facts) -> str | None:
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return replace(step, corpus_resident=False)

    def apply(self, target: BatchLayout) -> Applied:
        before = target.mapped
        target.mapped = True

        def undo() -> None:
            target.mapped = before

        return Applied(1, "token file", undo)
