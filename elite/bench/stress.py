"""`mode=profile`: what this machine sustains, by kind of work; about half a minute.

Every figure is of work as training does it: matrix products of real layers' sizes, attention kernels on long rows, copies from pinned
memory, the operations of a real model. A GPU is loaded for a while first, as its clocks fall under load.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from elite import hardware
from elite.bench.calm import CalmCores
from elite.bench.stress_disk import disk
from elite.bench.stress_host import Operations, largest_allocation, launch_s
from elite.config import RunConfig
from elite.console import console
from elite.executor.streamed.kernels import KERNELS, AttentionShape, Kernel
from elite.facts import Device
from elite.hardware.profiles import AttentionProfile, Machine, Profile, least, machine_of, write
from elite.report.profile_table import render

LAYERS = ((2560, 10240), (4096, 14336), (1536, 8960))
"""Inputs and outputs of MLP maps: Phi-2, Llama-3.1-8B, Qwen2.5-1.5B."""
HEAD_DIMS = (64, 80, 128)
HEADS, KV_HEADS = 16, 4


@dataclass(frozen=True)
class Sizes:
    """How much work is done."""

    tokens: int
    """Rows of a matrix product."""
    square: int
    """Queries of attention; of keys twice as many."""
    copy_bytes: int
    disk_bytes: int
    seconds: float
    """Of each figure."""
    warm_s: float
    """Of load before the first figure."""


GPU = Sizes(tokens=8192, square=8192, copy_bytes=2**29, disk_bytes=2**29, seconds=0.4, warm_s=3.0)
CPU = Sizes(tokens=256, square=512, copy_bytes=2**27, disk_bytes=2**28, seconds=1.0, warm_s=0.0)


def profile_machine(config: RunConfig, device: Device) -> Profile:
    """Measure the machine that `config` names, print what was found, and keep it in the cache folder."""
    gpus = [] if device.kind == "cpu" else hardware.nvml_gpus()
    gpu, cache = least(gpus) if gpus else None, Path(config.output.cache).expanduser()
    place = torch.device("cpu") if gpu is None else torch.device("cuda", gpus.index(gpu))
    began = time.perf_counter()
    profile = stress(machine_of(gpu), place, _compute_dtype(device, gpu), cache, console)
    console.print(render(profile, device))
    path = write(profile, cache)
    console.print(f"{time.perf_counter() - began:.0f} s; plans for this machine now use these rates: {path}", markup=False)
    return profile


def _compute_dtype(device: Device, gpu: hardware.Gpu | None) -> torch.dtype:
    """Of training's matrix products; the card's own, also where it stands in for an older one."""
    if gpu is None:
        return torch.bfloat16 if device.supports_bf16 else torch.float32
    return torch.bfloat16 if gpu.compute_capability >= (8, 0) else torch.float16


def stress(machine: Machine, device: torch.device, dtype: torch.dtype, cache: Path, screen: Console, sizes: Sizes | None = None) -> Profile:
    """Measure this machine.

    Args:
        machine: what the profile is of.
        dtype: of training's matrix products here.
        cache: whose disk is measured.
        screen: where progress is shown.
        sizes: how much work; None for what suits the device.
    """
    bench = _Bench(device, dtype, sizes or (GPU if device.type == "cuda" else CPU))
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    found: dict[str, Any] = {}
    steps = _steps(bench, cache)
    with Progress(*columns, console=screen, transient=True) as progress:
        bar = progress.add_task("", total=len(steps))
        for name, measure in steps:
            progress.update(bar, description=name, refresh=True)
            found |= measure()
            progress.advance(bar)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Profile(machine=machine, measured_at=now, compute_dtype=str(dtype).removeprefix("torch."), **found)


def _steps(bench: "_Bench", cache: Path) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    device = bench.device
    return [
        ("largest allocation", lambda: {"largest_allocation_bytes": largest_allocation(device)}),
        ("host time of operations", bench.handed),
        ("matrix products", bench.products),
        ("copies on the device", lambda: {"copy_bytes": bench.copied()}),
        ("attention", bench.attention),
        ("copies to and from the host", bench.linked),
        ("disk", lambda: disk(cache, bench.sizes.disk_bytes)),
        # Cores that others share may have been slow at first.
        ("host time of operations", bench.handed),
    ]


class _Bench:
    """Measurements on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
        self.device, self.dtype, self.sizes = device, dtype, sizes
        self._handed: dict[str, float] = {}

    def handed(self) -> dict[str, float]:
        """Host time of a launch and of an operation; the least so far."""
        cores = CalmCores()
        operations = Operations(self.device, self.dtype, cores)
        with cores.chosen():
            cores.settle()
            launching = launch_s(self.device)
        now = {"launch_s": launching, "operation_s": operations.seconds()}
        self._handed = {name: min(value, self._handed.get(name, value)) for name, value in now.items()}
        return self._handed

    def products(self) -> dict[str, float]:
        """Matrix products in the compute dtype and in fp32; FLOP/s."""
        begin = time.perf_counter()
        while time.perf_counter() - begin < self.sizes.warm_s:
            self._product_rate(self.dtype, LAYERS[:1])
        half = self._product_rate(self.dtype, LAYERS)
        fp32 = half if self.dtype is torch.float32 else self._product_rate(torch.float32, LAYERS[:1])
        return {"matmul_flops": half, "fp32_flops": fp32}

    def copied(self) -> float:
        """A copy on the device, bytes read and written a second."""
        source = torch.zeros(self.sizes.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self._seconds(lambda: target.copy_(source))

    def attention(self) -> dict[str, Any]:
        """Every kernel that runs here, at every head dimension."""
        found, left_out = list[AttentionProfile](), dict[str, str]()
        for head_dim in HEAD_DIMS:
            for name, measure in self._kernels(head_dim, left_out):
                try:
                    found.append(measure())
                except torch.cuda.OutOfMemoryError:
                    raise
                except RuntimeError as failure:
                    left_out[f"{name}, head dimension {head_dim}"] = f"fails here: {str(failure).splitlines()[0]}"
        return {"attention": tuple(found), "left_out": left_out}

    def linked(self) -> dict[str, float]:
        """Pinned host memory to device and back, alone and both at once. On a CPU, which is both, an ordinary copy."""
        if self.device.type == "cpu":
            # Half of what a copy reads and writes is what it moves.
            moved = self.copied() / 2
            return dict.fromkeys(("to_device_bytes", "to_host_bytes", "both_to_device_bytes", "both_to_host_bytes"), moved)
        size = self.sizes.copy_bytes // 2
        hosts = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        devices = [torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        streams = [torch.cuda.Stream(self.device) for _ in range(2)]

        def into() -> None:
            with torch.cuda.stream(streams[0]):
                devices[0].copy_(hosts[0], non_blocking=True)

        def out() -> None:
            with torch.cuda.stream(streams[1]):
                hosts[1].copy_(devices[1], non_blocking=True)

        def both() -> None:
            into()
            out()

        alone = [size / self._seconds(copy) for copy in (into, out)]
        # Together until the slower one is through.
        at_once = size / self._seconds(both)
        names = ("to_device_bytes", "to_host_bytes", "both_to_device_bytes", "both_to_host_bytes")
        return dict(zip(names, (*alone, min(at_once, alone[0]), min(at_once, alone[1])), strict=True))

    def _product_rate(self, dtype: torch.dtype, layers: tuple[tuple[int, int], ...]) -> float:
        flops = seconds = 0.0
        for inputs, outputs in layers:
            x = torch.randn(self.sizes.tokens, inputs, device=self.device, dtype=dtype)
            weight = torch.randn(outputs, inputs, device=self.device, dtype=dtype)
            seconds += self._seconds(partial(F.linear, x, weight))
            flops += 2.0 * self.sizes.tokens * inputs * outputs
        return flops / seconds

    def _kernels(self, head_dim: int, left_out: dict[str, str]) -> Iterator[tuple[str, Callable[[], AttentionProfile]]]:
        if self.device.type == "cpu":
            yield "sdpa", partial(self._attended, "sdpa", head_dim, *_sdpa())
            return
        shape = AttentionShape(HEADS, KV_HEADS, head_dim, self.dtype)
        for name, kernel in KERNELS.items():
            reason = "forms every score" if name == "math" else kernel.supports(shape, self.device)
            if reason is not None:
                left_out[name] = reason
                continue
            yield name, partial(self._attended, name, head_dim, *_library(kernel, head_dim**-0.5))

    def _attended(self, name: str, head_dim: int, forward: Callable[..., Any], backward: Callable[..., Any]) -> AttentionProfile:
        n = self.sizes.square
        square, long = (self._attention_rates(head_dim, keys, causal, forward, backward) for keys, causal in ((n, True), (2 * n, False)))
        return AttentionProfile(name, head_dim, n, *square, *long)

    def _attention_rates(
        self, head_dim: int, keys: int, causal: bool, forward: Callable[..., Any], backward: Callable[..., Any]
    ) -> tuple[float, float]:
        """FLOP/s forward and backward."""
        n = self.sizes.square
        q, do = (torch.randn(n, HEADS, head_dim, device=self.device, dtype=self.dtype) for _ in range(2))
        k, v = (torch.randn(keys, KV_HEADS, head_dim, device=self.device, dtype=self.dtype) for _ in range(2))
        pairs = (n * (n + 1) / 2 if causal else n * keys) * HEADS * head_dim
        made = forward(q, k, v, causal)
        there = self._seconds(lambda: forward(q, k, v, causal))
        back = self._seconds(lambda: backward(do, q, k, v, made, causal))
        return 4 * pairs / there, 10 * pairs / back

    def _seconds(self, call: Callable[[], object]) -> float:
        """Seconds of a call, from as many as fill the time of a figure, after one that is not counted."""
        call()
        self._wait()
        calls, began = 1, time.perf_counter()
        call()
        self._wait()
        each = time.perf_counter() - began
        share = self.sizes.seconds / 4
        while each * calls < share and calls < 2**12:
            # One call may be too short for the clock.
            calls *= 4
            began = time.perf_counter()
            for _ in range(calls):
                call()
            self._wait()
            each = (time.perf_counter() - began) / calls
        return each

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _library(kernel: Kernel, scale: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A kernel of the streamed executor, forward and backward."""

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
        return kernel.forward(q, k, v, causal, None, scale)

    def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, made: Any, causal: bool) -> Any:
        o, lse = made
        return kernel.backward(do, q, k, v, o, lse, causal, None, scale)

    return forward, backward


def _sdpa() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """torch's own attention, forward and backward as a kernel's."""

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
        tensors = query, key, value = [t.transpose(0, 1)[None].detach().requires_grad_() for t in (q, k, v)]
        return tensors, F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

    def backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, made: Any, causal: bool) -> Any:
        tensors, out = made
        return torch.autograd.grad(out, tensors, do.transpose(0, 1)[None], retain_graph=True)

    return forward, backward
