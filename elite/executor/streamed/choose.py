"""Which attention kernel is fastest here, measured once and remembered.

What:   the kernels that support a shape attend a chunk's own square and a block before it, forward and backward; the least total wins.
How:    before it is timed, a kernel's outputs and gradients over merged parts are compared with plain matrix products; one that is wrong
        on this machine is left out. Plain products are the choice only where no library kernel is left.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeGuard

import torch
from torch import Tensor

from elite.errors import PlanError
from elite.executor.streamed.kernels import KERNELS, AttentionShape, Kernel, merge
from elite.executor.streamed.math_kernel import MATH

log = logging.getLogger("elite.executor")

CHOICES = "attention_kernels.json"
"""File in the cache folder: what was measured, by what it was measured for."""
MOST_QUERIES = 4096
"""Timed at once, which fill a GPU: the trial comes in the first step, and its tensors should not be what that step takes most for."""
LEFT_BYTES = 40 * 1024**2
"""That may stay reserved for the trial's tensors."""
REPEATS = 2
"""Timed runs of each case; the fastest counts."""
LIMIT = 2e-2
"""Most relative error against plain products (2-norm) in fp16 and bf16."""
LIMIT_FP32 = 2e-3
"""The same in fp32, which some kernels multiply as TF32."""


@dataclass(frozen=True)
class _Case:
    """One kind of call: n queries on m keys."""

    name: str
    queries: int
    keys: int
    causal: bool
    window: int | None

    @property
    def pairs(self) -> int:
        """Query-key pairs that are not masked."""
        if not self.causal:
            return self.queries * self.keys
        before = self.keys - self.queries
        return sum(min(before + i + 1, self.window or self.keys) for i in range(self.queries))


def fastest(
    shape: AttentionShape, device: torch.device, cache: Path, chunk: int, block: int, allowed: Sequence[str] | None = None
) -> Kernel:
    """The fastest right kernel for this shape on this device.

    Args:
        cache: folder where the choice is remembered; a file there that cannot be read is measured anew.
        chunk, block: queries and keys of the executor's calls, of which `MOST_QUERIES` and twice as many are timed: rates no longer change.
        allowed: names to choose among; None for all.

    Raises:
        PlanError: no allowed kernel attends this shape rightly on this device.
    """
    names = tuple(KERNELS) if allowed is None else tuple(allowed)
    reasons = {name: KERNELS[name].supports(shape, device) if name in KERNELS else "is not known" for name in names}
    usable = [KERNELS[name] for name in names if reasons[name] is None]
    libraries = [kernel for kernel in usable if kernel is not MATH]
    if libraries:
        key = _key(shape, device, chunk, block, libraries)
        entry = _read(cache / CHOICES).get(key)
        if not _is_choice(entry, libraries):
            entry = _measure(libraries, shape, device, chunk, block)
            _write(cache / CHOICES, {**_read(cache / CHOICES), key: entry})
        if entry["choice"] is not None:
            return KERNELS[entry["choice"]]
        reasons |= entry["wrong"]
    if MATH in usable:
        if device.type == "cuda":
            left_out = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
            log.warning("attention of %s runs as plain matrix products, which is slow: %s", _words(shape), left_out)
        return MATH
    said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise PlanError(f"no attention kernel for {_words(shape)} on {_device_name(device)} ({said})", "allow more kernels, or executor=whole")


def rates(shape: AttentionShape, device: torch.device, kernel: Kernel, chunk: int, block: int) -> dict[str, float]:
    """TFLOP/s of a kernel, by `diagonal_forward`, `diagonal_backward`, `prefix_forward` and `prefix_backward`.

    The diagonal is a chunk on itself, causal, the prefix a chunk on a block, unmasked; a window has a diagonal alone, with the keys
    before the chunk that it reaches. Each unmasked pair counts 4·H·D FLOP forward and 10·H·D backward (two and five products).
    """
    found = {}
    for case in _cases(shape, chunk, block):
        forward, backward = _seconds(kernel, shape, device, case)
        flops = case.pairs * shape.heads * shape.head_dim / 1e12
        found[f"{case.name}_forward"], found[f"{case.name}_backward"] = 4 * flops / forward, 10 * flops / backward
    return found


def error(kernel: Kernel, shape: AttentionShape, device: torch.device) -> float:
    """Largest relative error (2-norm) of o, L, dq, dk and dv against plain products, over merged parts; NaN if any is."""
    n, m = 192, 512
    q, do = _random(shape, device, shape.heads, n, 0), _random(shape, device, shape.heads, n, 1)
    k, v = _random(shape, device, shape.kv_heads, m, 2), _random(shape, device, shape.kv_heads, m, 3)
    window, scale = None if shape.window is None else min(shape.window, 100), shape.head_dim**-0.5
    do_, q_, k_, v_ = (t.float() for t in (do, q, k, v))
    o, lse = MATH.forward(q_, k_, v_, True, window, scale)
    expected = (o, lse, *MATH.backward(do_, q_, k_, v_, o, lse, True, window, scale))
    relative = [
        ((got.double() - right.double()).norm() / right.double().norm()).item()
        for got, right in zip(_in_parts(kernel, do, q, k, v, window, scale), expected, strict=True)
    ]
    return max(relative) if all(e == e for e in relative) else float("nan")


def _in_parts(kernel: Kernel, do: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> tuple[Tensor, ...]:
    """o, L, dq, dk, dv as the executor computes them."""
    before = len(k) - len(q)
    if window is not None:
        o, lse = kernel.forward(q, k, v, True, window, scale)
        return o, lse, *kernel.backward(do, q, k, v, o, lse, True, window, scale)
    if kernel.reaches_back:
        o, lse = kernel.forward(q, k, v, True, None, scale)
    else:
        o, lse = merge(
            *kernel.forward(q, k[before:], v[before:], True, None, scale), *kernel.forward(q, k[:before], v[:before], False, None, scale)
        )
    own = kernel.backward(do, q, k[before:], v[before:], o, lse, True, None, scale)
    prefix = kernel.backward(do, q, k[:before], v[:before], o, lse, False, None, scale)
    return o, lse, own[0].float() + prefix[0], torch.cat([prefix[1], own[1]]), torch.cat([prefix[2], own[2]])


def _measure(kernels: Sequence[Kernel], shape: AttentionShape, device: torch.device, chunk: int, block: int) -> dict[str, Any]:
    """The choice, what each right kernel took, and what is wrong with the others."""
    limit = LIMIT if shape.dtype.itemsize < 4 else LIMIT_FP32
    seconds, wrong = {}, {}
    queries, reserved = min(chunk, MOST_QUERIES), _reserved(device)
    for kernel in kernels:
        try:
            found = error(kernel, shape, device)
        except torch.cuda.OutOfMemoryError:
            # The device is full: that says nothing about the kernel, and must not be remembered as if it did.
            raise
        except RuntimeError as failure:
            wrong[kernel.name] = f"fails here: {str(failure).splitlines()[0]}"
            continue
        if not found <= limit:
            wrong[kernel.name] = f"is wrong here by {found:.1e}"
            continue
        seconds[kernel.name] = sum(sum(_seconds(kernel, shape, device, case)) for case in _cases(shape, queries, min(block, 2 * queries)))
    if _reserved(device) > reserved + LEFT_BYTES:
        # What has been taken for the steps goes, too.
        torch.cuda.empty_cache()
    return {"choice": min(seconds, key=lambda name: seconds[name], default=None), "seconds": seconds, "wrong": wrong}


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _cases(shape: AttentionShape, chunk: int, block: int) -> Iterator[_Case]:
    if shape.window is not None:
        yield _Case("diagonal", chunk, chunk + shape.window - 1, True, shape.window)
        return
    yield _Case("diagonal", chunk, chunk, True, None)
    yield _Case("prefix", chunk, block, False, None)


def _seconds(kernel: Kernel, shape: AttentionShape, device: torch.device, case: _Case) -> tuple[float, float]:
    """Seconds of a forward and of a backward call."""
    q, do = _random(shape, device, shape.heads, case.queries, 0), _random(shape, device, shape.heads, case.queries, 1)
    k, v = _random(shape, device, shape.kv_heads, case.keys, 2), _random(shape, device, shape.kv_heads, case.keys, 3)
    how = (case.causal, case.window, shape.head_dim**-0.5)
    o, lse = kernel.forward(q, k, v, *how)
    return (
        _timed(lambda: kernel.forward(q, k, v, *how), device),
        _timed(lambda: kernel.backward(do, q, k, v, o, lse, *how), device),
    )


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter()

    call()
    taken = []
    for _ in range(REPEATS):
        start = now()
        call()
        taken.append(now() - start)
    return min(taken)


def _random(shape: AttentionShape, device: torch.device, heads: int, tokens: int, seed: int) -> Tensor:
    """[tokens, heads, D], from a generator of its own: training's random numbers must not depend on whether this was measured."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tokens, heads, shape.head_dim, generator=generator, device=device, dtype=shape.dtype)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _words(shape: AttentionShape) -> str:
    window = "" if shape.window is None else f", a window of {shape.window}"
    dtype = str(shape.dtype).removeprefix("torch.")
    return f"{shape.heads} query and {shape.kv_heads} key heads of {shape.head_dim} in {dtype}{window}"


def _key(shape: AttentionShape, device: torch.device, chunk: int, block: int, kernels: Sequence[Kernel]) -> str:
    facts = {
        "device": _device_name(device),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        **asdict(shape),
        "chunk": chunk,
        "block": block,
        "kernels": [kernel.name for kernel in kernels],
    }
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _is_choice(entry: object, kernels: Sequence[Kernel]) -> TypeGuard[dict[str, Any]]:
    if not isinstance(entry, dict) or "choice" not in entry or not isinstance(entry.get("wrong"), dict):
        return False
    return entry["choice"] is None or entry["choice"] in {kernel.name for kernel in kernels}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, choices: dict[str, Any]) -> None:
    """In one move, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(choices, indent=1))
    part.replace(path)
