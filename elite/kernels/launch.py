"""Launches of Triton kernels that cost the host little: what was compiled for arguments of one kind is remembered and called at once.

Triton looks at every argument of every launch, makes a key of what it sees, finds the compiled kernel under it and calls hooks that are
there even when nobody has set any. Here a launch is known by the device, the numbers themselves and the dtypes of the tensors. That tells
apart at least what Triton tells apart, which is of a number its width, whether it is 1 and whether 16 divides it, and of a tensor its
dtype and whether 16 divides its address: misaligned tensors go Triton's way, as do first launches, those that a profiler's hooks want to
see, the interpreter's and those of a GPU that is not Nvidia's or a Triton whose launchers are not known.
Source: triton/runtime/jit.py and python/src/specialize.cc, the same in 3.6 and 3.7.
"""

import logging
from functools import cache, reduce
from operator import attrgetter, or_
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

KNOWN = ("3.6", "3.7")
"""Tritons whose compiled kernels are called as here."""
ALIGNMENT = 16
"""Bytes; Triton compiles other code for addresses that are no multiple."""
UNFUSED: dict[str, Any] = {"enable_fp_fusion": False}
"""Of a launch in which a product is rounded before something is added to it, as in plain torch."""
MOST_KINDS = 1024
"""Launches that are remembered of a kernel; where lengths differ from step to step, they are forgotten now and then."""

_ONES = (1, 1, 1)
_address, _dtype, _on_gpu = Tensor.data_ptr, attrgetter("dtype"), attrgetter("is_cuda")

log = logging.getLogger("elite.kernels")


class Launch:
    """A kernel with its compile-time values. Its parameters are tensors, integers, parameters that are not specialised, constants.

    Args:
        kernel: what `triton.jit` made.
        constants: compile-time parameters and options of the launch (`num_warps`).
    """

    def __init__(self, kernel: Any, **constants: Any) -> None:
        self._kernel, self.constants = kernel, constants
        self._compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def __call__(self, grid: tuple[int, ...], tensors: tuple[Tensor, ...], numbers: tuple[int, ...], free: tuple[float, ...] = ()) -> None:
        """Launch on the current device and stream.

        Args:
            grid: programs along one to three dimensions.
            tensors, numbers, free: the kernel's arguments in this order; `free` are floats, and integers that the kernel declares to be
                `tl.int64` and not to be specialised.
        """
        # The compiler traces Triton's own launches.
        gpu = None if torch.compiler.is_dynamo_compiling() or not isinstance(self._kernel, JITFunction) else _gpu()
        key = None
        if gpu is not None and not _hooked() and all(map(_on_gpu, tensors)):
            addresses = [*map(_address, tensors)]
            if not reduce(or_, addresses) % ALIGNMENT:
                device = gpu.get_current_device()
                key = (device, *numbers, *map(_dtype, tensors))
                if (ready := self._compiled.get(key)) is not None:
                    run, function, metadata, constants = ready
                    where = *grid, *_ONES[len(grid) :], gpu.get_current_stream(device), function, metadata
                    # Nothing is told of this launch, neither before nor after it.
                    run(*where, None, None, None, *addresses, *numbers, *free, *constants)
                    return
        made = self._kernel[grid](*tensors, *numbers, *free, **self.constants)
        # Nothing is made where a hook has taken the compilation over.
        if key is not None and made is not None:
            self._remember(key, made, len(tensors) + len(numbers), free)

    def _remember(self, key: tuple[Any, ...], made: Any, before: int, free: tuple[float, ...]) -> None:
        for parameter, value in zip(self._kernel.params[before:], free, strict=False):
            assert type(value) is float or (parameter.do_not_specialize and parameter.annotation_type == "i64"), parameter.name
        if len(self._compiled) == MOST_KINDS:
            self._compiled.clear()
        # A launcher counts the compile-time parameters, but does not read them.
        constants = [None] * (len(self._kernel.params) - before - len(free))
        self._compiled[key] = made.run, made.function, made.packed_metadata, constants


def _hooked() -> bool:
    """Whether anybody wants to be told of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@cache
def _gpu() -> Any:
    """Triton's driver if its kernels may be called directly, else None; asked at the first launch, when there is a device."""
    if not triton.__version__.startswith(tuple(f"{version}." for version in KNOWN)):
        log.warning("kernels cost the host more with Triton %s than with %s", triton.__version__, " and ".join(KNOWN))
        return None
    return driver.active if driver.active.get_current_target().backend == "cuda" else None
