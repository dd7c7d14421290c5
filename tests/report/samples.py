"""Small measurement files of the shapes that benchmarks and probes write, with round figures."""

import json
from pathlib import Path
from typing import Any

from elite.facts import GIB
from elite.streaming import BoundaryEncoding, Keep, Place, Streaming, WeightPlace

ENVIRONMENT = {"commit": "abc1234", "command": ["bench.py"], "versions": {"torch": "2.99.0", "transformers": "5.99.0"}}
MODEL = {
    "name": "tiny",
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "weights": "random",
    "adapter": "lora, rank 4",
}
PROFILE = {"attention_s": 6.0, "other_compute_s": 3.0, "exposed_copies_s": 0.5, "host_s": 0.3, "short_gaps_s": 0.2, "wall_s": 10.0}
LAYOUT = Streaming(keep=Keep.attention, weights=WeightPlace.streamed)
LOSSY = Streaming(
    keep=Keep.multilevel, slots=3, encoding=BoundaryEncoding.int4, boundaries=Place.disk, keys_values=Place.host, folder="/home/me/rows"
)


def step(seconds: float, gib: float) -> dict[str, float]:
    """One optimizer step."""
    return {"step_s": seconds, "allocated_peak_bytes": (gib - 0.5) * GIB, "reserved_peak_bytes": gib * GIB}


def _run(name: str, tokens: int, steps: list[dict[str, float]]) -> dict[str, Any]:
    layout = LAYOUT.to_dict() if name == "streamed" else None
    run = {"name": name, "model": MODEL, "device": "Card 1", "context": tokens, "layout": layout, "steps": steps}
    return run | ({"host_pinned_bytes": 6 * GIB, "profile": PROFILE if tokens > 1024 else None} if layout else {})


def comparison() -> dict[str, Any]:
    """Two contexts: at 1,024 tokens the executors are as fast, at 4,096 the streamed one twice as fast."""
    recipe = [_run("recipe", tokens, [step(99, 2), step(tokens / 128, tokens / 256)]) for tokens in (1024, 4096)]
    streamed = [
        _run("streamed", 1024, [step(99, 3), step(8, 3)]),
        _run("streamed", 4096, [step(99, 5), step(15, 4), step(16, 4), step(17, 4)]),
    ]
    floors = [{"context": 1024, "step_s": 4.0}, {"context": 4096, "step_s": 12.0}]
    return {"environment": ENVIRONMENT, "runs": recipe + streamed, "floors": floors, "rates": {}}


def probe(tokens: int, steps: list[dict[str, float]], layout: Streaming = LAYOUT) -> dict[str, Any]:
    """A probe that says 90 seconds and 5 GiB, planned were 120 and 4.5."""
    return {
        "environment": ENVIRONMENT,
        "model": MODEL,
        "device": "Card 1 held to card2",
        "context": tokens,
        "layout": layout.to_dict(),
        "planned": {"device_bytes": 4.5 * GIB, "host_bytes": 7 * GIB, "step_s": 120.0},
        "probe": step(90, 5) | {"tokens": tokens, "host_pinned_bytes": 7 * GIB},
        "steps": steps,
    }


def kernel_row(op: str, which: str, ms: dict[str, float | str], tokens: int = 8192, variant: str = "") -> dict[str, Any]:
    """An operation whose providers take `ms` milliseconds, 64 MiB more each and an error of 2e-3; or why there is no time."""
    providers: dict[str, dict[str, Any]] = {
        name: {"unavailable": value} if isinstance(value, str) else {"ms": [value, value, value], "error": 2e-3, "peak_bytes": 2**26 * i}
        for i, (name, value) in enumerate(ms.items(), 1)
    }
    if op != "linear_cross_entropy":
        providers["elite"]["bandwidth_share"] = 0.9 if which == "forward" else 0.8
    return {"op": op, "variant": variant, "model": "tiny", "tokens": tokens, "pass": which, "shape": [[4, 4]], "providers": providers}


def kernels() -> dict[str, Any]:
    """A norm that Liger makes faster forward, a GELU that nobody does, few tokens that do not count, and a head's loss."""
    rows = [
        kernel_row("norm", "forward", {"elite": 2.0, "eager": 8.0, "compile": 2.2, "liger": 1.86}),
        kernel_row("norm", "forward+backward", {"elite": 4.0, "eager": 24.0, "compile": 4.8, "liger": 5.0}),
        kernel_row("norm", "forward", {"elite": 1.0, "eager": 0.5, "compile": 0.5, "liger": 0.5}, tokens=64),
        kernel_row("gelu", "forward", {"elite": 1.0, "eager": 9.0, "eager_fused": 1.1, "compile": 0.996}),
        kernel_row(
            "linear_cross_entropy",
            "forward+backward",
            {"elite": 10.0, "eager": "NotMeasuredError: too large", "liger": 12.0, "liger_fp32": 15.0, "cce": 9.5, "cce_exact": 20.0},
            variant="trained head",
        ),
        kernel_row("merge", "forward", {"elite": "OutOfMemoryError: CUDA out of memory", "eager": 1.0}),
    ]
    return {
        "environment": ENVIRONMENT | {"libraries": {"liger-kernel": "9.9", "gone": None}},
        "device": "Card 1",
        "copy_gb_s": 3000.0,
        "rows": rows,
    }


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    """As a measurement."""
    (folder / f"{name}.json").write_text(json.dumps({"name": name} | content))
