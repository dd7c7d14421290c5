"""Every kernel against everyone else who has the operation: `python -m elite.bench.kernels FILE [--models …] [--tokens …] [--ops …]`.

On one CUDA GPU, for operations, models' geometries, tokens and passes: elite's kernel, eager torch, torch.compile with static shapes,
Liger, cut-cross-entropy and bitsandbytes, in bf16. Each provider's results are compared with the reference in fp32 first. What cannot be
measured is kept with its reason. The file is written after every operation, so that an interrupted run loses one.
"""

import argparse
import gc
import importlib.metadata
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elite.bench import kernel_pointwise, kernel_products, kernel_rows
from elite.bench.assemble import write
from elite.bench.kernel_case import BOTH, FORWARD, Call, Case, Cases, Geometry, Make, geometry
from elite.bench.kernel_clock import Clock, as_tuple, error
from elite.console import console
from elite.runfolder import environment

MODELS = ("phi2", "llama31_8b", "qwen25_coder_1_5b", "smollm2_135m")
TOKENS = (8192, 32768)
OPS: dict[str, Cases] = {
    "norm": kernel_pointwise.norm,
    "add_norm": kernel_pointwise.add_norm,
    "rotary": kernel_pointwise.rotary,
    "swiglu": kernel_pointwise.swiglu,
    "gelu": kernel_pointwise.gelu,
    "residual": kernel_pointwise.residual,
    "linear_cross_entropy": kernel_products.linear_cross_entropy,
    "lora": kernel_products.lora,
    "dequantise": kernel_rows.dequantise,
    "group_sum": kernel_rows.group_sum,
    "merge": kernel_rows.merge,
    "pack": kernel_rows.pack,
}
SHORT = frozenset({"linear_cross_entropy", "lora", "dequantise"})
"""Only at the fewest tokens unless tokens are asked for: time and matrix products grow alike, or no token has a part in it."""
LIBRARIES = ("liger-kernel", "cut-cross-entropy", "bitsandbytes", "triton")
OURS, COMPILED = "elite", "compile"

Results = dict[str, tuple[Tensor, ...]]
"""By pass: outputs, or gradients."""


def compare(geometries: Sequence[Geometry], tokens: Sequence[int] | None, ops: Sequence[str], clock: Clock) -> Iterator[dict[str, Any]]:
    """The whole result so far, after every operation on a geometry; `tokens` as by default where None."""
    device = clock.device
    found: dict[str, Any] = {
        "environment": environment() | {"libraries": {name: _version(name) for name in LIBRARIES}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "copy_gb_s": clock.copy_gb_s(),
        "rows": [],
    }
    for op in ops:
        for g in geometries:
            for count in tokens or (TOKENS[:1] if op in SHORT else TOKENS):
                torch.manual_seed(0)
                for case in OPS[op](g, count, device):
                    for row in measured(case, clock, found["copy_gb_s"]):
                        found["rows"].append(row)
                        # An error's text may hold brackets, which are no markup.
                        console.print(progress(row), markup=False)
                # Cases are webs of closures.
                gc.collect()
                yield found


def measured(case: Case, clock: Clock, copy_gb_s: float) -> list[dict[str, Any]]:
    """A row for each pass."""
    expected, why = _expected(case)
    by_provider = {name: _provided(case, name, make, expected, clock) for name, make in case.providers(clock.device).items()}
    rows = []
    for which in case.passes:
        moved = case.moved.get(which)
        row = {
            "op": case.op,
            "variant": case.variant,
            "model": case.geometry.name,
            "tokens": case.tokens,
            "pass": which,
            "shape": case.shape,
            "bytes": moved,
            "providers": {name: _with_share(found[which], moved, copy_gb_s) for name, found in by_provider.items()},
        }
        rows.append(row | ({"unchecked": why} if why else {}))
    return rows


def progress(row: dict[str, Any]) -> str:
    """A line about a row: our time and the fastest other one's, else everyone's state."""
    times = {name: found["ms"][1] for name, found in row["providers"].items() if "ms" in found}
    place = f"{row['op']:21} {row['variant']:13} {row['model']:18} {row['tokens']:7,} {row['pass']:17}"
    lost = [f"{name}: {found['unavailable']}" for name, found in row["providers"].items() if "unavailable" in found]
    others = {name: ms for name, ms in times.items() if name != OURS}
    said = "not measured"
    if OURS in times and others:
        best = min(others, key=lambda name: others[name])
        said = f"{times[OURS]:9.3f} ms  {others[best] / times[OURS]:6.2f}× {best}"
    elif times:
        said = ", ".join(f"{name} {ms:.3f} ms" for name, ms in times.items())
    return "  ".join([place, said, *lost])


def _expected(case: Case) -> tuple[Results, str]:
    """What the reference gives on the same values in fp32; else why there is none."""

    def wide(value: Any) -> Any:
        half = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().float().requires_grad_(value.requires_grad) if half else value

    try:
        return _results(case, case.reference(), tuple(map(wide, case.checked_inputs))), ""
    except Exception as failure:  # as below
        return {}, _reason(failure)


def _results(case: Case, call: Call, inputs: tuple[Any, ...]) -> Results:
    outputs = as_tuple(call(*inputs))
    found = {FORWARD: tuple(t.detach() for t in outputs)}
    return found | ({BOTH: _gradients(case, outputs, inputs, _upstream(case, outputs))} if BOTH in case.passes else {})


def _gradients(case: Case, outputs: tuple[Tensor, ...], inputs: tuple[Any, ...], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, [t for t in inputs if isinstance(t, Tensor) and t.requires_grad], upstream)


def _upstream(case: Case, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What arrives at the outputs, the same for everyone, new each time: a provider may write to it. A sum of losses becomes a mean."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [
        torch.full_like(t, 1 / case.tokens)
        if t.ndim == 0
        # Drawn in one dtype, so that all dtypes get the same values, rounded to half as they arrive in training.
        else torch.randn(t.shape, generator=generator, device=t.device).to(torch.bfloat16).to(t.dtype)
        for t in outputs
    ]


def _provided(case: Case, name: str, make: Make, expected: Results, clock: Clock) -> dict[str, dict[str, Any]]:
    """Figures by pass, or why there are none."""
    if name == COMPILED:
        torch.compiler.reset()
    try:
        return _timed(case, make(), name == COMPILED, expected, clock)
    except Exception as failure:
        # Only here: libraries raise whatever they like for shapes, dtypes and versions they do not take, which is a result to keep, and
        # no reason to lose the other providers' figures.
        return dict.fromkeys(case.passes, {"unavailable": _reason(failure)})
    finally:
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()


def _timed(case: Case, call: Call, compiles: bool, expected: Results, clock: Clock) -> dict[str, dict[str, Any]]:
    case = case.owned()
    results, seconds = clock.first(lambda: _results(case, call, case.checked_inputs))
    errors = {which: error(results[which], right) for which, right in expected.items() if which in case.passes}
    upstream = _upstream(case, results[FORWARD]) if BOTH in case.passes else []
    del results

    def forward() -> Any:
        return call(*case.inputs)

    def both() -> Any:
        return _gradients(case, as_tuple(call(*case.inputs)), case.inputs, upstream)

    found: dict[str, dict[str, Any]] = {}
    for which in case.passes:
        run = forward if which == FORWARD else both
        # Where the inputs compared are others, it is now that a compiler sees those timed.
        seconds += clock.first(run)[1] if case.checked else 0.0
        peak = clock.peak_bytes(run)
        found[which] = {"ms": clock.quantiles(run), "error": errors.get(which)} | ({} if peak is None else {"peak_bytes": peak})
    return {which: line | ({"compile_s": seconds} if compiles else {}) for which, line in found.items()}


def _with_share(found: dict[str, Any], moved: int | None, copy_gb_s: float) -> dict[str, Any]:
    """With `bandwidth_share`: the bytes that must move, over the time, over the bandwidth of a copy."""
    if moved is None or "ms" not in found:
        return found
    return found | {"bandwidth_share": moved / found["ms"][1] / 1e6 / copy_gb_s}


def _reason(failure: Exception) -> str:
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0] if text else ''}"[:200]


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--tokens", type=int, nargs="+", help="8192 and 32768; for matrix products 8192 alone")
    parser.add_argument("--ops", nargs="+", choices=tuple(OPS), default=tuple(OPS))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    for found in compare([geometry(name) for name in arguments.models], arguments.tokens, arguments.ops, Clock(device)):
        write(arguments.file, found | {"seconds": time.perf_counter() - began})


if __name__ == "__main__":
    main()
