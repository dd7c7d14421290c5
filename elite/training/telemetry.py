"""What a step cost: memory peaks, time, throughput."""

import resource
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import torch

from elite.distributed.ranks import Ranks


@dataclass
class Meter:
    """Reads the machine after each step; peaks are those of the step, not what happens to be allocated after it.

    Args:
        flops_per_token: model FLOPs of forward and backward at a context, without recomputation (Chowdhery et al. 2022, appendix B).
        peak_flops_per_s: the device's rate in the compute dtype, for MFU; 0 leaves MFU out as 0.
    """

    ranks: Ranks
    flops_per_token: Callable[[int], float]
    peak_flops_per_s: float
    baseline_rss_bytes: int = field(default_factory=lambda: psutil.Process().memory_info().rss)
    highest: dict[str, float] = field(default_factory=dict)
    """Largest value seen of every memory figure."""

    def read(self, tokens: int, context: int, seconds: float) -> dict[str, float]:
        """Figures of a step over `tokens` tokens (all ranks) in rows of `context` that took `seconds`."""
        per_s = tokens / seconds
        flops = per_s * self.flops_per_token(context) / self.ranks.world
        memory = self.memory()
        return {
            "tokens_per_s": per_s,
            "tflops": flops / 1e12,
            "mfu": flops / self.peak_flops_per_s if self.peak_flops_per_s else 0.0,
            **memory,
            "step_time_s": seconds,
        }

    def memory(self) -> dict[str, float]:
        """Peaks since the last reading; the largest of all ranks. GPU figures are 0 on a CPU."""
        cuda = self.ranks.device.type == "cuda"
        figures = {
            "gpu_peak_bytes": float(torch.cuda.max_memory_allocated()) if cuda else 0.0,
            "gpu_reserved_bytes": float(torch.cuda.max_memory_reserved()) if cuda else 0.0,
            "host_rss_bytes": float(psutil.Process().memory_info().rss),
        }
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        figures = {name: self.ranks.max(value) for name, value in figures.items()}
        self.highest = {name: max(value, self.highest.get(name, 0.0)) for name, value in figures.items()}
        return figures

    def measured_peak_bytes(self) -> float:
        """What the plan's total is compared with: allocated GPU memory, or on a CPU the process's growth since before the model.

        The host does not forget a peak: on a CPU trials of a larger micro-batch count.
        """
        if self.ranks.device.type == "cuda":
            return self.highest.get("gpu_peak_bytes", 0.0)
        return self.ranks.max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0 - self.baseline_rss_bytes)


def pinned_bytes(own: float, device: torch.device) -> float:
    """Page-locked host memory: the streamed executor's `own`, and the most that torch's allocator held; what it caches is locked too."""
    if device.type != "cuda":
        return own
    torch.cuda.synchronize(device)
    stats = torch.cuda.host_memory_stats()
    # The second is its name in older versions.
    return float(own + max(stats.get(f"{kind}_bytes.peak", 0) for kind in ("allocated", "reserved")))


def paged_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state that CUDA may keep in host memory."""
    tensors = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors if getattr(tensor, "is_paged", False))


def error_percent(predicted: float, measured: float) -> float | None:
    """How far a prediction is off, in percent of what was measured; above 0 it promised too much. None where nothing was measured."""
    return (predicted / measured - 1) * 100 if measured else None
