"""Direct launches run what Triton's own would run: compiled here for a GPU that is not there, and run on one that is."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, product
from operator import attrgetter
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from elite.kernels import launch
from elite.kernels.launch import MOST_KINDS, Launch

BLOCK = 256
ROOM = 8192
Arguments = tuple[tuple[int, ...], tuple[Tensor, ...], tuple[int, ...], tuple[float, ...]]


@triton.jit(do_not_specialize=["seed"])
def _mix(x, y, out, cells, step, p, seed: tl.int64, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < cells
    total = tl.load(x + at * step, mask=inside, other=0.0).to(tl.float32) * p + tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if TWICE:
        total *= 2
    tl.store(out + at, (total + (seed % 7).to(tl.float32)).to(out.dtype.element_ty), mask=inside)


def mixed(tensors: tuple[Tensor, ...], numbers: tuple[int, ...], free: tuple[float, ...], twice: bool) -> Tensor:
    """What `_mix` writes to its first cells."""
    (x, y, out), (cells, step), (p, seed) = tensors, numbers, free
    total = x[: cells * step : step].float() * p + y[:cells].float()
    return ((2 * total if twice else total) + seed % 7).to(out.dtype)


def cases(device: str) -> list[Arguments]:
    """In no order, each twice: addresses on and off 16 bytes, numbers of every kind, other dtypes."""
    made = list[Arguments]()
    where = ((0, 0, 0), 1), ((16, 8, 0), 16), ((1, 0, 0), 2), ((0, 0, 3), 1)
    for dtype, numbers in ((torch.float32, (1, 16, 17)), (torch.bfloat16, (16,))):
        for number, (offsets, step) in product(numbers, where):
            kinds = dtype, torch.float32, dtype
            tensors = [torch.randn(ROOM, device=device).to(kind)[offset:] for kind, offset in zip(kinds, offsets, strict=True)]
            made.append(((triton.cdiv(number, BLOCK),), tuple(tensors), (number, step), (0.5, 2**40 + number)))
    many = [*made, *made]
    random.Random(0).shuffle(many)
    return many


class NoGPU:
    """Of Triton's drivers: compiles for a GPU, and notes launches instead of making them."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.utils, self._handles = self, count(1)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**17}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 0, next(self._handles), 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def run(
            x: int, y: int, z: int, stream: int, function: int, packed: Any, told: Any, enter: Any, leave: Any, *arguments: Any
        ) -> None:
            values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
            # Compile-time values are compiled in, and numbers that are 1 as well.
            self.launched.append((x, y, z, stream, function, packed, len(values), *values[: -len(("TWICE", "BLOCK"))]))

        return run


@contextmanager
def no_gpu(patch: pytest.MonkeyPatch) -> Iterator[NoGPU]:
    gpu, before = NoGPU(), driver._active
    patch.setattr(launch, "_gpu", lambda: gpu)
    patch.setattr(launch, "_on_gpu", attrgetter("is_cpu"))
    driver.set_active(gpu)
    _mix.device_caches.clear()
    try:
        yield gpu
    finally:
        driver._active = before
        _mix.device_caches.clear()


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Triton's own launches of `_mix`."""
    seen, run = list[Any](), _mix.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(_mix, "run", counted)
    return seen


def test_what_is_launched_is_what_triton_launches(monkeypatch: pytest.MonkeyPatch, ordinary: list[Any]) -> None:
    mix = Launch(_mix, TWICE=True, BLOCK=BLOCK, num_warps=2)
    with no_gpu(monkeypatch) as gpu:
        for grid, tensors, numbers, free in cases("cpu"):
            mix(grid, tensors, numbers, free)
            _mix[grid](*tensors, *numbers, *free, TWICE=True, BLOCK=BLOCK, num_warps=2)
            by_us, by_triton = gpu.launched[-2:]
            assert by_us == by_triton, (numbers, [t.data_ptr() % 16 for t in tensors])
    functions = {launched[4] for launched in gpu.launched}
    assert len(functions) > 8
    # Directly: the second launches of those that are aligned, half of all.
    assert len(gpu.launched) - len(ordinary) == len(cases("cpu")) // 4


def test_what_has_been_seen_is_bounded(monkeypatch: pytest.MonkeyPatch, ordinary: list[Any]) -> None:
    mix, x = Launch(_mix, TWICE=False, BLOCK=BLOCK), torch.zeros(ROOM)
    with no_gpu(monkeypatch) as gpu:
        for number in range(2, MOST_KINDS + 4):
            mix((1,), (x, x, x), (number, 1), (0.5, 3))
            assert len(mix._compiled) <= MOST_KINDS
    assert len(gpu.launched) == len(ordinary) == MOST_KINDS + 2


def test_only_what_never_specialises_may_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    mix, x = Launch(_mix, TWICE=False, BLOCK=BLOCK), torch.zeros(ROOM)
    with no_gpu(monkeypatch), pytest.raises(AssertionError, match="step"):
        mix((1,), (x, x, x), (16,), (1, 0.5, 3))


def test_hooks_are_told(monkeypatch: pytest.MonkeyPatch, ordinary: list[Any]) -> None:
    mix, x, told = Launch(_mix, TWICE=False, BLOCK=BLOCK), torch.zeros(ROOM), list[Any]()
    with no_gpu(monkeypatch):
        mix((1,), (x, x, x), (16, 1), (0.5, 3))
        mix((1,), (x, x, x), (16, 1), (0.5, 3))
        assert len(ordinary) == 1
        knobs.runtime.launch_enter_hook.add(told.append)
        try:
            mix((1,), (x, x, x), (16, 1), (0.5, 3))
        finally:
            knobs.runtime.launch_enter_hook.remove(told.append)
        assert len(ordinary) == 2
        mix((1,), (x, x, x), (16, 1), (0.5, 3))
        assert len(ordinary) == 2


@pytest.mark.gpu
def test_launches_on_a_gpu(ordinary: list[Any]) -> None:
    mixes = {twice: Launch(_mix, TWICE=twice, BLOCK=BLOCK, num_warps=2) for twice in (False, True)}
    given = [(case, twice) for case in cases("cuda") for twice in mixes]
    for (grid, (x, y, out), numbers, free), twice in given:
        mixes[twice](grid, (x, y, out), numbers, free)
        found = out.clone()
        out.zero_()
        _mix[grid](x, y, out, *numbers, *free, TWICE=twice, BLOCK=BLOCK, num_warps=2)
        assert torch.equal(found[: numbers[0]], out[: numbers[0]])
        torch.testing.assert_close(out[: numbers[0]], mixed((x, y, out), numbers, free, twice), rtol=1e-2, atol=1e-2)
    assert 2 * len(given) - len(ordinary) == len(given) // 4


@pytest.mark.gpu
def test_it_runs_on_the_current_stream() -> None:
    mix, x = Launch(_mix, TWICE=False, BLOCK=BLOCK), torch.ones(ROOM, device="cuda")
    mix((1,), (x, x, torch.empty_like(x)), (16, 1), (0.5, 7))
    side, out = torch.cuda.Stream(), torch.zeros_like(x)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.add_(1)
        mix((1,), (x, x, out), (16, 1), (0.5, 7))
    side.synchronize()
    assert torch.equal(out[:16], torch.full_like(out[:16], 3.0))


@pytest.mark.gpu
def test_memory_of_the_host_is_refused() -> None:
    mix, x = Launch(_mix, TWICE=False, BLOCK=BLOCK), torch.ones(ROOM, device="cuda")
    for _ in range(2):
        mix((1,), (x, x, x), (16, 1), (0.5, 7))
    with pytest.raises(ValueError, match="cpu tensor"):
        mix((1,), (x, torch.ones(ROOM), x), (16, 1), (0.5, 7))
