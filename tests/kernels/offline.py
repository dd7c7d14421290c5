"""Kernels compiled for GPUs that are not here, and what of a GPU's shared memory they take."""

from dataclasses import dataclass, field
from typing import Any

SHARED_BYTES = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KiB of shared memory a program may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""


@dataclass(frozen=True)
class Launch:
    """One way a kernel is launched.

    Args:
        signature: Triton types of the arguments that are no constants, by name: `*bf16`, `i64`, `fp32`; others are ignored.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)


def shared_kib(launch: Launch, capability: int) -> float:
    """Compile to machine code; KiB of shared memory that a program takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {name: "constexpr" if name in launch.constants else launch.signature[name] for name in names}
    # As at run time: pointers that torch allocates are aligned.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(launch.kernel, signature, constexprs=launch.constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    assert len(made.asm["cubin"]) > 0
    return made.metadata.shared / 1024
