"""Compiled decoder layers.

What:   torch.compile on each decoder layer; layers of one kind share what is compiled.
How:    the layer's forward, as other parts have left it, is compiled; attention stays what it is, outside of the graphs, so that other
        lengths of documents compile nothing anew. The first pass of each kind takes the time (training, then validation without
        gradients); graphs, breaks and recompilations are counted and told at the end. With gradient checkpointing a layer is recomputed
        as a whole: what a compiled graph keeps is its own choice, and leaving products out would change that choice.
Memory: no more than without it: fused operations keep less, how much less is the compiler's choice, and the plan takes nothing off.
Source: Ansel et al. 2024, PyTorch 2 (ASPLOS); torch.compile.
"""

import os
import shutil
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step

COMPILERS = {"cpu": ("g++", "clang++", "c++"), "cuda": ("gcc", "cc", "clang")}
"""What inductor builds its kernels with on a CPU, and Triton its launchers on a GPU."""
DOCUMENTS = "documents_at_hand"
"""Attribute of an attention module in a compiled layer: the documents of the micro-batch, which the graphs know nothing of."""


class Backend(Enum):
    """Who makes code of the graphs."""

    inductor = "inductor"
    aot_eager = "aot_eager"
    """Nobody: traced, differentiated and run as it is. Needs no compiler; shows what tracing alone does."""


class TorchCompile(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        backend: Backend = Backend.inductor

    name = "torch_compile"
    title = "compiled decoder layers"
    row = 19
    stage = Stage.executor
    exactness = Exactness.EQUAL
    claims: ClassVar[frozenset[Site]] = frozenset({Site.COMPILATION})
    source = "Ansel et al. 2024"

    def check(self, facts: Facts) -> str | None:
        if facts.executor == "streamed":
            return "the streamed executor ends a layer's forward once its keys are known, which a compiled layer cannot"
        compilers = COMPILERS[facts.device.kind]
        if self.config.backend is Backend.inductor and facts.device.present and not _found(compilers):
            return f"there is no compiler on this machine (none of {', '.join(compilers)}, nor CC or CXX in the environment)"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: Any) -> Applied:
        from elite.optimizations.functions.compiled import CompiledLayers

        layers = target.get_decoder().layers
        compiled = CompiledLayers(layers, self.config.backend.value)
        return Applied(len(layers), f"decoder layers by {self.config.backend.value}", compiled.undo, compiled.words)


def _found(compilers: tuple[str, ...]) -> bool:
    return any(shutil.which(name) for name in (*compilers, *(os.environ[key] for key in ("CC", "CXX") if os.environ.get(key))))
