"""One configuration, assembled as a run would be and stepped, with what it took beside what its plan said.

On a CPU, where no allocator counts, `allocated` is what live tensors take, and there is neither a reserved peak nor a driver's.
"""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from elite.bench.assemble import Assembled, assembled, described
from elite.bench.calibrate.clock import clock, host_s, timed
from elite.bench.calibrate.host import DriverMemory, ResidentMemory, Sampled, free_host_memory
from elite.bench.calibrate.sample import Drawn
from elite.bench.calm import CalmCores
from elite.bench.stress import HEAD_DIMS
from elite.bench.stress_host import Operations
from elite.compose import from_overrides
from elite.config import RunConfig
from elite.data.batches import Batch
from elite.executor.contract import Executor
from elite.executor.streamed.choose import error as kernel_error
from elite.executor.streamed.kernels import KERNELS, AttentionShape
from elite.report.calibration import OUT_OF_MEMORY, RAN
from elite.training.ahead import alloc_retries
from elite.training.live_bytes import LiveBytes
from elite.training.shortage import is_out_of_memory
from elite.training.telemetry import pinned_bytes

WATCHED = 2
"""Steps, of which the first warms up, while threads read what has no peak of its own."""
FAILED = "error"
"""How a configuration ended that neither ran nor was short of memory."""
IN_GAPS = re.compile(r"and ([\d.]+) (\w+) is reserved by PyTorch but unallocated")
UNITS = {"bytes": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
"""Of torch's own words when memory runs out."""
KINDS = ("allocated", "reserved", "requested", "active", "inactive_split")
"""Of the figures in bytes that torch's allocator keeps a peak of."""


FEW = 1024
"""Tokens of a step for which kernels are compiled."""
SIZED = frozenset({"tier.context", "training.global_batch_tokens", "training.micro_batch", "executor.chunk"})
"""What says how many tokens a configuration has."""
SMALL = (
    "model=llama31_8b",
    "model.weights=random",
    "model.num_hidden_layers=2",
    "model.hidden_size=512",
    "model.intermediate_size=1024",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.vocab_size=4096",
    "tier=tier1",
    "tier.context=2048",
    "tier.target_length=64",
    "training.max_steps=1",
    "training.global_batch_tokens=2048",
    # Its plan knows nothing of kernels being tried.
    "plan.take_ahead=false",
)
WARM = tuple(
    ("optimizations=none", executor, *(f"optimizations.{name}.enabled=true" for name in names))
    for executor, *names in (
        ("executor=whole", "mixed_precision", "flash_attention", "qlora", "checkpoint_offload", "liger_kernels", "adamw_8bit"),
        ("executor=streamed", "mixed_precision", "fused_kernels", "fused_lora"),
    )
)
"""Small configurations, which between them need every library."""


class Machine:
    """The device at hand, and everything to read on it. Made before CUDA begins.

    Args:
        cache: folder of converted models and kernel choices; unset: the usual one.
    """

    def __init__(self, cache: str | None = None) -> None:
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.driver, half = DriverMemory() if cuda else None, torch.float32
        if cuda:
            half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
            _warm(half)
        self.name = torch.cuda.get_device_name() if cuda else "CPU"
        # Before any configuration, so that its memory never lies beside what was taken for steps.
        self.cores = CalmCores()
        self.operations = Operations(self.device, half, self.cores)
        self._own_bytes = 0.0
        for number, overrides in enumerate(WARM if cuda else ()):
            # Libraries that some configurations need are loaded then, and their host memory is no configuration's.
            with assembled(configured(Drawn(str(number), (*SMALL, *overrides)), cache)) as made:
                made.step()
        self._own_bytes = self.cleared()

    def rehearse(self, drawn: Drawn, cache: str | None) -> None:
        """Take a step of few tokens, for which kernels are compiled: what compilers take of host memory and keep is no configuration's."""
        self.cleared()
        with assembled(configured(at_few_tokens(drawn), cache)) as made:
            made.step()

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
        return torch.cuda.memory_allocated() - self._own_bytes


def at_few_tokens(drawn: Drawn) -> Drawn:
    """The same configuration for one short row, in several chunks where it is streamed."""
    kept = [line for line in drawn.overrides if line.partition("=")[0] not in SIZED]
    chunk = (f"executor.chunk={FEW // 4}",) if "executor=streamed" in drawn.overrides else ()
    return replace(drawn, overrides=(*kept, f"tier.context={FEW}", f"training.global_batch_tokens={FEW}", "training.micro_batch=1", *chunk))


def _warm(half: torch.dtype) -> None:
    """Load the libraries that every configuration needs, so that the first one's host memory is not theirs."""
    a = torch.ones(256, 256, device="cuda", dtype=half, requires_grad=True)
    (a @ a).sum().backward()
    for head_dim in HEAD_DIMS:
        shape = AttentionShape(2, 2, head_dim, half)
        for kernel in KERNELS.values():
            if kernel.supports(shape, a.device) is None:
                kernel_error(kernel, shape, a.device)
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
    row: dict[str, Any] = drawn.to_dict()
    with ended(row):
        if machine.driver is not None:
            machine.rehearse(drawn, cache)
        row["allocated_before_bytes"] = machine.cleared()
        with ResidentMemory() as resident, ready(configured(drawn, cache), machine, row) as (made, watch):
            taken: dict[str, Any] = {}
            steps: list[dict[str, Any]] = []
            row["steps"] = steps
            with Sampled(machine.driver.read) if machine.driver else nullcontext() as driver:
                with resident.aside():
                    # Whatever few tokens did not need is compiled, by a compiler that takes more host memory than a small configuration.
                    steps.append(stepped(made, watch))
                while len(steps) < WATCHED:
                    steps.append(stepped(made, watch))
            for kind in ("allocated", "reserved"):
                if f"{kind}_peak_bytes" in steps[0]:
                    taken[f"{kind}_bytes"] = max(step[f"{kind}_peak_bytes"] for step in steps)
            if machine.driver is not None and driver is not None:
                taken |= {"device_bytes": driver.peak, "device_method": machine.driver.method}
            attached = made.executors.attached
            taken["host_pinned_bytes"] = pinned_bytes(attached.runner.host_bytes() if attached else 0, machine.device)
            taken |= {"host_rss_bytes": resident.growth, "host_rss_by_kernel": resident.by_kernel}
            row["measured"] = taken
            clock(row, made, timed(made, machine))
    return row


def timed_again(row: dict[str, Any], machine: Machine, cache: str | None = None) -> None:
    """The row with steps timed anew, if the host is faster now than it was then; how fast the steps themselves are decides nothing. If it
    fails now, it is a miss as it would have been before."""
    machine.cleared()
    with ended(row), assembled(configured(Drawn(row["name"], tuple(row["overrides"])), cache)) as made:
        for _ in range(WATCHED):
            made.step()
        steps = timed(made, machine)
        if host_s(steps) < host_s(row["timed"]):
            row.setdefault("timed_before", []).append(row["timed"])
            clock(row, made, steps)


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
        if (stuck := in_gaps(str(failure))) is not None:
            row["in_gaps_bytes"] = stuck
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
    before = alloc_retries(made.ranks.device)
    watch.begin()
    done = made.step()
    watch.end("backward")
    parts = {part: peaks["allocated_peak_bytes"] for part, peaks in watch.found.items()}
    found = {name: done[name] for name in ("step_s", "tokens_per_s", "loss")} | watch.highest() | {"allocated_by_part": parts}
    return found | {"alloc_retries": alloc_retries(made.ranks.device) - before}


def predicted(made: Assembled) -> dict[str, Any]:
    """What the plan says of this configuration."""
    plan = made.plan
    return {
        "allocated_bytes": plan.total_bytes,
        "needed_bytes": plan.needed_bytes,
        "reserved_bytes": plan.reserved_bytes,
        "ahead_bytes": plan.ahead_bytes,
        "device_bytes": plan.device_bytes,
        "host_pinned_bytes": plan.host_bytes,
        "step_s": plan.step_s,
        "step_flops": plan.step_flops,
        "memory": plan.memory,
    }


def in_gaps(words: str) -> float | None:
    """Bytes that torch's allocator had reserved when memory ran out, that nobody used and that it could not give back."""
    found = IN_GAPS.search(words)
    return None if found is None else float(found[1]) * UNITS[found[2]]


def reason(failure: BaseException) -> str:
    """A failure in one line."""
    lines = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"[:300]
