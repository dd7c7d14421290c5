"""The stress test, really run on this CPU with little work."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from elite import hardware
from elite.bench.stress import HEAD_DIMS, Sizes, stress
from elite.bench.stress_disk import disk
from elite.bench.stress_host import OPERATIONS, Operations
from elite.config import HardwareConfig
from elite.hardware.profiles import machine_of, read, write
from elite.plan.rates import rates_of
from elite.report.profile_table import render
from tests.conftest import Program
from tests.plan.test_launches import WITHIN, Count

LITTLE = Sizes(tokens=32, square=64, copy_bytes=2**22, disk_bytes=2**22, seconds=0.02, warm_s=0.0)


def test_every_figure_is_measured_kept_and_shown(tmp_path: Path) -> None:
    machine, screen = machine_of(None), io.StringIO()
    found = stress(machine, torch.device("cpu"), torch.float32, tmp_path, Console(file=screen, force_terminal=True), LITTLE)
    assert {line.head_dim for line in found.attention} == set(HEAD_DIMS)
    assert "disk" in screen.getvalue()
    assert 1e8 < found.matmul_flops < 1e14
    assert 1e8 < found.copy_bytes < 1e13
    assert 1e-7 < found.launch_s < found.operation_s < 1e-2
    write(found, tmp_path)
    assert read(machine, tmp_path) == found
    device = hardware.device(HardwareConfig(name="cpu"), cache=tmp_path)
    assert rates_of(device).matmul_flops_per_s == found.matmul_flops
    shown = io.StringIO()
    Console(file=shown, width=100).print(render(found, device))
    for words in ("matrix products, float32", "sdpa attention, heads of 128, backward", "disk, written", "assumed"):
        assert words in shown.getvalue()
    # The test's file is gone.
    assert {path.name for path in tmp_path.iterdir()} == {"hardware"}


def test_operations_of_the_tiny_model_are_counted() -> None:
    """In half precision, as on a GPU."""
    tiny = Operations(torch.device("cpu"), torch.bfloat16)
    tiny._step()
    with Count() as counted:
        tiny._step()
    assert pytest.approx(counted.number, rel=WITHIN) == OPERATIONS


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    Operations(torch.device("cpu"), torch.float32).seconds(2)
    assert torch.get_num_threads() == before


def test_a_full_disk_is_left_alone(tmp_path: Path) -> None:
    assert disk(tmp_path, 2**60) == {"disk_write_bytes": 0.0, "disk_read_bytes": 0.0}
    assert not list(tmp_path.iterdir())


def test_an_absent_card_cannot_be_measured(program: Program) -> None:
    done = program("mode=profile", "hardware=rtx3090")
    if torch.cuda.is_available():
        pytest.skip("a card is here")
    assert done.returncode == 2
    assert "hardware=rtx3090 is not in this machine" in done.stderr + done.stdout
