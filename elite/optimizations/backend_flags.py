"""Flags of torch's CUDA backends.

What:   TF32 in fp32 matrix products (10 bits of mantissa instead of 23, on tensor cores) and in cuDNN; cuDNN's search for its fastest
        algorithms.
How:    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.benchmark, before the model exists.
        Products in bf16 or fp16 stay as they are.
Memory: unchanged; a search may use cuDNN's workspace for the length of a call.
Source: NVIDIA 2020, A100 white paper; torch.backends.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from elite.errors import ConfigError
from elite.facts import Facts
from elite.optimizations.contract import Applied, Exactness, Optimization, OptimizationConfig, Site, Stage, Step

TENSOR_FLOAT = (8, 0)
"""Compute capability from which there is TF32."""


class BackendFlags(Optimization):
    """See the module's docstring."""

    @dataclass(frozen=True)
    class Config(OptimizationConfig):
        """Options."""

        tf32: bool = True
        """In matrix products and cuDNN."""
        cudnn_benchmark: bool = True

        def __post_init__(self) -> None:
            if self.enabled and not (self.tf32 or self.cudnn_benchmark):
                raise ConfigError(
                    "optimizations.backend_flags: neither tf32 nor cudnn_benchmark is on", "optimizations.backend_flags.enabled=false"
                )

    name = "backend_flags"
    title = "TF32 and cuDNN flags"
    row = 33
    stage = Stage.runtime
    exactness = Exactness.EQUAL
    claims: ClassVar[frozenset[Site]] = frozenset({Site.BACKEND_FLAGS})
    source = "NVIDIA 2020; torch.backends"

    def check(self, facts: Facts) -> str | None:
        if facts.device.kind != "cuda":
            return "a CPU has neither TF32 nor cuDNN"
        capability = facts.device.compute_capability
        if capability is not None and capability < TENSOR_FLOAT:
            return f"TF32 begins with compute capability 8.0; this device has {capability[0]}.{capability[1]}"
        return None

    def memory(self, step: Step, facts: Facts) -> Step:
        return step

    def apply(self, target: Any) -> Applied:
        from torch import backends

        flags = [(backends.cuda.matmul, "allow_tf32"), (backends.cudnn, "allow_tf32")] if self.config.tf32 else []
        flags += [(backends.cudnn, "benchmark")] if self.config.cudnn_benchmark else []
        before = [getattr(module, name) for module, name in flags]
        for module, name in flags:
            setattr(module, name, True)

        def undo() -> None:
            for (module, name), value in zip(flags, before, strict=True):
                setattr(module, name, value)

        return Applied(len(flags), "flags", undo)
