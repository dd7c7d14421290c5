"""One configuration, assembled as a run would be and stepped, with what it took beside what its plan said.

On a CPU, where no allocator counts, `allocated` is what live tensors take, and there is neither a reserved peak nor a driver's.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor

from elite.bench.assemble import Assembled, assembled, described
from elite.bench.calibrate.host import DriverMemory, Pace, ResidentMemory, Sampled, free_host_memory
from elite.bench.calibrate.sample import Drawn
from elite.compose import from_overrides
from elite.config import RunConfig
from elite.data.batches import Batch
from elite.executor.contract import Executor
from elite.report.calibration import OUT_OF_MEMORY, RAN
from elite.training.live_bytes import LiveBytes
from elite.training.shortage import is_out_of_memory
from elite.training.telemetry import pinned_bytes

WATCHED = 2
"""Steps, of which the first warms up, while threads read what has no peak of its own."""
ALIKE, SPREAD = 3, 0.05
"""Steps are timed, nobody watching, until so many in a row differ by no more than this share of the fastest …"""
LONGEST_S = 6.0
"""… or have taken this long in all. Their median, of the last ones, is a step's time."""
DISTURBED = 1.25
"""The host's pace before or after a step from which that does not count, as long as others do."""
FAILED = "error"
"""How a configuration ended that neither ran nor was short of memory."""
KINDS = ("allocated", "reserved", "requested", "active", "inactive_split")
"""Of the figures in bytes that torch's allocator keeps a peak of."""


class Machine:
    """The device at hand, and everything to read on it. Made before CUDA begins."""

    def __init__(self) -> None:
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.driver, self.pace = DriverMemory() if cuda else None, Pace()
        if cuda:
            _warm()
        self.name = torch.cuda.get_device_name() if cuda else "CPU"

    def cleared(self) -> float:
        """Forget the last configuration; bytes that are still allocated on the device."""
        free_host_memory()
        if self.driver is None:
            return 0.0
        torch.cuda.synchronize()
        # One for each stream that ever multiplied; they would count as the next configuration's.
        clear: Any = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
        self.driver.settle()
        return float(torch.cuda.memory_allocated())


def _warm() -> None:
    """Load the libraries that every configuration needs, so that the first one's host memory is not theirs."""
    a = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    query = torch.ones(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
    torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    (a @ a).sum().backward()
    if find_spec("triton"):
        from elite.kernels.norm.kernel import norm

        # The compiler stays loaded.
        norm(a, a[0], None, 1e-6, center=False)
    torch.cuda.synchronize()


class Watch:
    """Peaks of device memory, by part of a step."""

    def __init__(self, device: torch.device, live: LiveBytes | None) -> None:
        self._device, self.live = device, live
        self.found: dict[str, dict[str, float]] = {}

    def begin(self) -> None:
        """Forget what was."""
        self.found = {}
        self._reset()

    def end(self, part: str) -> None:
        """What came since the last part belongs to this one."""
        self.found[part] = self._peaks()
        self._reset()

    def highest(self) -> dict[str, float]:
        """Over all parts."""
        kinds = {name for peaks in self.found.values() for name in peaks}
        return {name: max(peaks.get(name, 0.0) for peaks in self.found.values()) for name in sorted(kinds)}

    def _peaks(self) -> dict[str, float]:
        if self.live is not None:
            return {"allocated_peak_bytes": float(self.live.peak)}
        stats = torch.cuda.memory_stats(self._device)
        return {f"{kind}_peak_bytes": float(stats.get(f"{kind}_bytes.all.peak", 0)) for kind in KINDS}

    def _reset(self) -> None:
        if self.live is not None:
            self.live.peak = self.live.current
        else:
            torch.cuda.reset_peak_memory_stats(self._device)


class _Watched:
    """An executor whose forward pass ends a part."""

    def __init__(self, inner: Executor, watch: Watch) -> None:
        self.model, self._inner, self._watch = inner.model, inner, watch

    def loss_sum(self, batch: Batch, keep: Tensor | None = None) -> Tensor:
        loss = self._inner.loss_sum(batch, keep)
        self._watch.end("forward")
        return loss


def measured(drawn: Drawn, machine: Machine, cache: str | None = None) -> dict[str, Any]:
    """The whole row of one configuration: how it ended, what was predicted, what it took.

    Args:
        cache: folder of converted models and kernel choices; unset: the usual one.
    """
    row: dict[str, Any] = drawn.to_dict() | {"allocated_before_bytes": machine.cleared()}
    with ended(row):
        with ResidentMemory() as resident, ready(configured(drawn, cache), machine, row) as (made, watch):
            taken: dict[str, Any] = {}
            steps: list[dict[str, Any]] = []
            row["steps"] = steps
            with Sampled(machine.driver.read) if machine.driver else nullcontext() as driver:
                with resident.aside():
                    # Kernels are compiled, by a compiler that takes more host memory than a small configuration.
                    steps.append(stepped(made, watch))
                while len(steps) < WATCHED:
                    steps.append(stepped(made, watch))
            timed = list[tuple[float, float]]()
            while not is_steady(timed):
                before = machine.pace()
                steps.append(stepped(made, watch))
                steps[-1]["host_pace"] = max(before, machine.pace())
                timed.append((steps[-1]["step_s"], steps[-1]["host_pace"]))
            for kind in ("allocated", "reserved"):
                if f"{kind}_peak_bytes" in steps[0]:
                    taken[f"{kind}_bytes"] = max(step[f"{kind}_peak_bytes"] for step in steps)
            if machine.driver is not None and driver is not None:
                taken |= {"device_bytes": driver.peak, "device_method": machine.driver.method}
            attached = made.executors.attached
            taken["host_pinned_bytes"] = pinned_bytes(attached.runner.host_bytes() if attached else 0, machine.device)
            taken |= {"step_s": median(counted(timed))}
        row["measured"] = taken | {"host_rss_bytes": resident.growth, "host_rss_by_kernel": resident.by_kernel}
    return row


def is_steady(timed: list[tuple[float, float]]) -> bool:
    """Whether steps of so many seconds, at that pace of the host, say what one takes."""
    last, calm = counted(timed), [pace < DISTURBED for _, pace in timed]
    return sum(seconds for seconds, _ in timed) >= LONGEST_S or (
        sum(calm) >= ALIKE and len(last) == ALIKE and max(last) <= (1 + SPREAD) * min(last)
    )


def counted(timed: list[tuple[float, float]]) -> list[float]:
    """Seconds of the last steps that nothing disturbed; of the last ones where something disturbed all."""
    calm = [seconds for seconds, pace in timed if pace < DISTURBED]
    return (calm or [seconds for seconds, _ in timed])[-ALIKE:]


@contextmanager
def ended(row: dict[str, Any]) -> Iterator[None]:
    """Within, a failure becomes the row's outcome."""
    began = time.perf_counter()
    try:
        yield
        row["outcome"] = RAN
    except Exception as failure:
        # A miss is a result; so is whatever a library raises for one configuration, and no reason to lose the others' figures.
        row |= {"outcome": OUT_OF_MEMORY if is_out_of_memory(failure) else FAILED, "error": reason(failure)}
    row["seconds"] = time.perf_counter() - began


def configured(drawn: Drawn, cache: str | None) -> RunConfig:
    """The configuration that was drawn."""
    config = from_overrides(*drawn.overrides).config
    return config if cache is None else replace(config, output=replace(config.output, cache=cache))


@contextmanager
def ready(config: RunConfig, machine: Machine, row: dict[str, Any]) -> Iterator[tuple[Assembled, Watch]]:
    """A configuration at its first step, and what watches its memory; `row` gets what is known by then."""
    with ExitStack() as stack:
        live = stack.enter_context(LiveBytes()) if machine.driver is None else None
        made = stack.enter_context(assembled(config))
        row |= described(made) | {"predicted": predicted(made)}
        watch = Watch(machine.device, live)
        if machine.driver is not None:
            torch.cuda.reset_peak_host_memory_stats()
        training = _Watched(made.executors.training, watch)
        yield replace(made, executors=replace(made.executors, training=training)), watch


def stepped(made: Assembled, watch: Watch) -> dict[str, Any]:
    """One optimizer step: seconds, loss, peaks, those of its forward and of what follows, and retries of the allocator."""
    cuda = made.ranks.device.type == "cuda"
    before = torch.cuda.memory_stats().get("num_alloc_retries", 0) if cuda else 0
    watch.begin()
    done = made.step()
    watch.end("backward")
    parts = {part: peaks["allocated_peak_bytes"] for part, peaks in watch.found.items()}
    found = {name: done[name] for name in ("step_s", "tokens_per_s", "loss")} | watch.highest() | {"allocated_by_part": parts}
    return found | ({"alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0) - before} if cuda else {})


def predicted(made: Assembled) -> dict[str, Any]:
    """What the plan says of this configuration."""
    plan = made.plan
    return {
        "allocated_bytes": plan.total_bytes,
        "reserved_bytes": plan.reserved_bytes,
        "ahead_bytes": plan.ahead_bytes,
        "device_bytes": plan.device_bytes,
        "host_pinned_bytes": plan.host_bytes,
        "step_s": plan.step_s,
        "step_flops": plan.step_flops,
        "memory": plan.memory,
    }


def reason(failure: BaseException) -> str:
    """A failure in one line."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:300]
