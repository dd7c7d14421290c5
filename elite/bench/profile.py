"""Where a step's time goes on the GPU: attention kernels, other computation, waits for copies, waits for the host.

From the profiler's trace. The compute stream is the one with most kernels. A gap on it belongs to the host as far as the next kernel
was launched only after the last one had ended; of the rest, what lies under a copy on another stream is an exposed copy. Gaps below
`SHORTEST_US` are the ordinary distance of two kernels.
"""

import json
import tempfile
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

SHORTEST_US = 5.0
ATTENTION = ("sdpa", "flash_fwd", "flash_bwd", "fmha", "attention", "compute_dot_do_o", "convert_dq", "dot_do_o")
"""Parts of attention kernels' names."""

Event = dict[str, Any]


def profiled(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of `call` by what the compute stream does; they sum to `wall_s`."""
    return split(_traced(call))


def sdpa_kernels(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Names of the kernels that torch's causal attention runs for this shape, longest first."""
    q, k, v = (torch.randn(1, n, 4096, head_dim, device=device, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    events = _traced(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads))
    return [event["name"][:80] for event in sorted(_on_gpu(events), key=lambda event: -event["dur"])][:2]


def split(events: list[Event]) -> dict[str, float]:
    """`wall_s`, `attention_s`, `other_compute_s`, `exposed_copies_s`, `host_s` and `short_gaps_s` of a Chrome trace's events."""
    on_gpu = _on_gpu(events)
    kernels = [event for event in on_gpu if event["cat"] == "kernel"]
    stream = Counter(event["args"]["stream"] for event in kernels).most_common(1)[0][0]
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    work = sorted((event for event in on_gpu if event["args"]["stream"] == stream), key=lambda event: event["ts"])
    copies = _merged([(e["ts"], e["ts"] + e["dur"]) for e in on_gpu if e["cat"] == "gpu_memcpy" and e["args"]["stream"] != stream])
    seconds: dict[str, float] = defaultdict(float)
    for event in work:
        attention = any(part in event["name"].lower() for part in ATTENTION)
        seconds["attention_s" if attention else "other_compute_s"] += event["dur"]
    for before, after in zip(work, work[1:], strict=False):
        begin, end = before["ts"] + before["dur"], after["ts"]
        if end - begin < SHORTEST_US:
            seconds["short_gaps_s"] += max(0.0, end - begin)
            continue
        # Until it is launched, a kernel cannot wait for a copy.
        free = min(max(begin, launched.get(after["args"].get("correlation"), 0.0)), end)
        exposed = _overlap(copies, free, end)
        seconds["host_s"] += free - begin
        seconds["exposed_copies_s"] += exposed
        seconds["short_gaps_s"] += end - free - exposed
    names = ("attention_s", "other_compute_s", "exposed_copies_s", "host_s", "short_gaps_s")
    found = {name: seconds[name] / 1e6 for name in names}
    return {"wall_s": sum(found.values()), **found}


def _traced(call: Callable[[], object]) -> list[Event]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_text())["traceEvents"]
    return events


def _on_gpu(events: list[Event]) -> list[Event]:
    return [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of spans, in order, without overlap."""
    union: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if union and begin <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((begin, end))
    return union


def _overlap(union: list[tuple[float, float]], begin: float, end: float) -> float:
    """How much of [begin, end] lies under `union`."""
    total = 0.0
    for first, last in union[max(0, bisect_left(union, (begin, begin)) - 1) :]:
        if first >= end:
            break
        total += max(0.0, min(last, end) - max(first, begin))
    return total
