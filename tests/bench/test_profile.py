"""Where a step's time goes, read from a trace whose gaps are known."""

from typing import Any

import pytest

from elite.bench.profile import split

COMPUTE, COPIES = 7, 9


def on_gpu(name: str, begin: float, end: float, correlation: int = 0, cat: str = "kernel", stream: int = COMPUTE) -> dict[str, Any]:
    return {"cat": cat, "name": name, "ts": begin, "dur": end - begin, "args": {"stream": stream, "correlation": correlation}}


def launch(correlation: int, at: float, cat: str = "cuda_runtime") -> dict[str, Any]:
    return {"cat": cat, "name": "launch", "ts": at, "dur": 1, "args": {"correlation": correlation}}


def copy(begin: float, end: float) -> dict[str, Any]:
    return on_gpu("Memcpy HtoD", begin, end, cat="gpu_memcpy", stream=COPIES)


TRACE = [
    on_gpu("pytorch_flash::flash_fwd_kernel", 0, 100, 1),
    # Two microseconds: the ordinary distance of two kernels.
    on_gpu("gemm", 102, 202, 2),
    # Launched 88 after the last had ended; 12 until it began.
    launch(3, 290),
    on_gpu("gemm", 302, 352, 3),
    # Launched in time; under two copies that overlap for 80 of 100.
    launch(4, 340, "cuda_driver"),
    copy(360, 430),
    copy(420, 440),
    on_gpu("cudnn_sdpa_bprop", 452, 500, 4),
    # Launched 40 late; of the copy's 70 only the 40 after that are waited for.
    copy(510, 580),
    launch(5, 540),
    on_gpu("elementwise", 600, 610, 5),
    # A copy on the compute stream is work of its own.
    on_gpu("Memcpy DtoD", 610, 630, cat="gpu_memcpy"),
    # Neither another stream's kernels nor the host's operators count.
    on_gpu("gemm", 205, 300, stream=COPIES),
    {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1000},
    {"ph": "M", "name": "process_name"},
]
EXPECTED = {"attention_s": 148, "other_compute_s": 180, "exposed_copies_s": 120, "host_s": 128, "short_gaps_s": 54}


@pytest.mark.parametrize("events", [TRACE, TRACE[::-1]], ids=["in order", "reversed"])
def test_a_trace_of_known_gaps(events: list[dict[str, Any]]) -> None:
    found = split(events)
    assert found.pop("wall_s") == pytest.approx(630e-6)
    assert found == pytest.approx({name: us / 1e6 for name, us in EXPECTED.items()})


def test_kernels_that_overlap_leave_no_gap() -> None:
    found = split([on_gpu("gemm", 0, 100, 1), on_gpu("gemm", 98, 200, 2)])
    assert found["short_gaps_s"] == found["host_s"] == 0 and found["other_compute_s"] == pytest.approx(202e-6)
