"""The choice of an attention kernel: right before fast, remembered, explained where there is none."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elite.errors import PlanError
from elite.executor.streamed import choose
from elite.executor.streamed.choose import CHOICES, LIMIT_FP32, error, fastest, rates
from elite.executor.streamed.kernels import KERNELS, AttentionShape
from elite.executor.streamed.math_kernel import Math

CPU = torch.device("cpu")
SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=8, dtype=torch.float32)


class Other(Math):
    """Stands for a library kernel: plain products under another name, `calls` counted."""

    def __init__(self, name: str, dv_factor: float = 1.0, failure: str | None = None) -> None:
        super().__init__()
        self.name = name  # type: ignore[misc]
        self.calls, self._dv_factor, self._failure = 0, dv_factor, failure

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self._failure:
            raise RuntimeError(self._failure)
        return super().forward(q, k, v, causal, window, scale)

    def backward_by_head(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward_by_head(do, q, k, v, o, lse, causal, window, scale)
        return dq, dk, dv * self._dv_factor


def register(monkeypatch: pytest.MonkeyPatch, *kernels: Other) -> None:
    for kernel in kernels:
        monkeypatch.setitem(KERNELS, kernel.name, kernel)


def test_a_cpu_runs_math(tmp_path: Path) -> None:
    assert fastest(SHAPE, CPU, tmp_path, 64, 128).name == "math"
    assert not (tmp_path / CHOICES).exists()


def test_no_kernel_is_an_error_that_names_each_reason(tmp_path: Path) -> None:
    shape = AttentionShape(4, 2, 8, torch.float16, window=32)
    with pytest.raises(PlanError) as raised:
        fastest(shape, CPU, tmp_path, 64, 128, ["cudnn", "flash", "flush"])
    assert raised.value.problem == (
        "no attention kernel for 4 query and 2 key heads of 8 in float16, a window of 32 on cpu "
        "(cudnn: runs on CUDA GPUs alone; flash: runs on CUDA GPUs alone; flush: is not known)"
    )
    assert raised.value.remedy


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_right_kernel_is_its_rounding(dtype: torch.dtype, window: int | None) -> None:
    shape = AttentionShape(4, 2, 8, dtype, window)
    assert error(Other("right"), shape, CPU) < 8 * torch.finfo(dtype).eps


def test_a_wrong_gradient_is_an_error_of_its_size() -> None:
    assert error(Other("wrong", dv_factor=1.25), SHAPE, CPU) == pytest.approx(0.25, rel=1e-3)
    assert not error(Other("nan", dv_factor=float("nan")), SHAPE, CPU) <= LIMIT_FP32


def test_a_wrong_kernel_is_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [Other("wrong", 1.25), Other("nan", float("nan")), Other("broken", failure="no such engine\nat line 1"), Other("right")]
    register(monkeypatch, *kernels)
    assert fastest(SHAPE, CPU, tmp_path, 64, 128) is kernels[3]
    (entry,) = json.loads((tmp_path / CHOICES).read_text()).values()
    assert entry["choice"] == "right" and set(entry["seconds"]) == {"right"}
    assert entry["wrong"] == {"wrong": "is wrong here by 2.5e-01", "nan": "is wrong here by nan", "broken": "fails here: no such engine"}
    assert fastest(SHAPE, CPU, tmp_path, 64, 128, ["wrong", "math"]).name == "math"
    with pytest.raises(PlanError, match=r"wrong: is wrong here by 2\.5e-01"):
        fastest(SHAPE, CPU, tmp_path, 64, 128, ["wrong"])


def test_the_least_total_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Other("first"), Other("second")
    register(monkeypatch, first, second)
    seconds = {"first": {"diagonal": (1.0, 2.0), "prefix": (4.0, 8.0)}, "second": {"diagonal": (2.0, 3.0), "prefix": (3.0, 6.0)}}
    monkeypatch.setattr(choose, "_seconds", lambda kernel, shape, device, case: seconds[kernel.name][case.name])
    assert fastest(SHAPE, CPU, tmp_path, 64, 128) is second
    (entry,) = json.loads((tmp_path / CHOICES).read_text()).values()
    assert entry["seconds"] == {"first": 15.0, "second": 14.0}


def test_a_choice_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Other("other")
    register(monkeypatch, kernel)
    folder = tmp_path / "not" / "yet"
    assert fastest(SHAPE, CPU, folder, 64, 128) is kernel
    calls = kernel.calls
    assert calls > 0
    assert fastest(SHAPE, CPU, folder, 64, 128) is kernel
    assert kernel.calls == calls
    assert [path.name for path in folder.iterdir()] == [CHOICES]


@pytest.mark.parametrize("change", ["shape", "chunk", "block", "kernels", "torch"])
def test_what_it_depends_on_is_measured_anew(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, more = Other("other"), Other("more", dv_factor=2.0)
    register(monkeypatch, kernel, more)
    shape, chunk, block, allowed = SHAPE, 64, 128, ["other"]
    fastest(shape, CPU, tmp_path, chunk, block, allowed)
    calls = kernel.calls
    if change == "shape":
        shape = AttentionShape(4, 2, 8, torch.float32, window=16)
    elif change == "chunk":
        chunk = 32
    elif change == "block":
        block = 64
    elif change == "kernels":
        allowed = ["other", "more"]
    else:
        monkeypatch.setattr(torch, "__version__", "2.99")
    assert fastest(shape, CPU, tmp_path, chunk, block, allowed) is kernel
    assert kernel.calls > calls
    assert len(json.loads((tmp_path / CHOICES).read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00", "stale", "partial"])
def test_an_unreadable_cache_is_measured_anew(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Other("other")
    register(monkeypatch, kernel)
    fastest(SHAPE, CPU, tmp_path, 64, 128)
    path = tmp_path / CHOICES
    (key,) = json.loads(path.read_text())
    entries = {"stale": {key: {"choice": "gone", "seconds": {}, "wrong": {}}}, "partial": {key: {"choice": "other"}}}
    path.write_text(json.dumps(entries[content]) if content in entries else content)
    calls = kernel.calls
    assert fastest(SHAPE, CPU, tmp_path, 64, 128) is kernel
    assert kernel.calls > calls
    assert json.loads(path.read_text())[key]["choice"] == "other"


def test_measuring_leaves_the_random_state_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Other("other"))
    state = torch.get_rng_state()
    fastest(SHAPE, CPU, tmp_path, 64, 128)
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_count_unmasked_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_seconds", lambda kernel, shape, device, case: (1e-12, 1e-12))
    each = SHAPE.heads * SHAPE.head_dim
    found = rates(SHAPE, CPU, KERNELS["math"], 64, 256)
    square, block = 64 * 65 // 2 * each, 64 * 256 * each
    assert found == pytest.approx(
        {
            "diagonal_forward": 4 * square,
            "diagonal_backward": 10 * square,
            "prefix_forward": 4 * block,
            "prefix_backward": 10 * block,
        }
    )
    windowed = AttentionShape(4, 2, 8, torch.float32, window=16)
    found = rates(windowed, CPU, KERNELS["math"], 64, 256)
    assert found == pytest.approx({"diagonal_forward": 4 * 64 * 16 * each, "diagonal_backward": 10 * 64 * 16 * each})


def test_rates_are_measured() -> None:
    found = rates(SHAPE, CPU, KERNELS["math"], 32, 64)
    assert set(found) == {"diagonal_forward", "diagonal_backward", "prefix_forward", "prefix_backward"}
    assert all(rate > 0 for rate in found.values())


def test_a_full_device_says_nothing_about_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Other("other"))

    def full(*_arguments: object) -> float:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(choose, "error", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        choose.fastest(SHAPE, CPU, tmp_path, 8, 16, ["other"])
    assert not (tmp_path / choose.CHOICES).exists()
