"""What was measured of a machine: kept, found again, taken for this machine's plans alone."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from elite import hardware
from elite.config import Cap, HardwareConfig
from elite.hardware.profiles import IN_RUNS, OF_RUNS, AttentionProfile, Profile, machine_of, measured_rates, path_of, read, write
from elite.plan.rates import rates_of
from tests.plan.helpers import hardware_config
from tests.test_hardware import H100, RTX3090

CARD = replace(H100, driver="580.1")


def line(kernel: str, head_dim: int, rate: float) -> AttentionProfile:
    return AttentionProfile(kernel, head_dim, 8192, rate / 2, rate / 2, rate, rate)


def profile_of(gpu: hardware.Gpu) -> Profile:
    return Profile(
        machine=machine_of(gpu),
        measured_at="2026-01-02T03:04:05+00:00",
        compute_dtype="bfloat16",
        largest_allocation_bytes=8e10,
        matmul_flops=6e14,
        fp32_flops=5e13,
        copy_bytes=3e12,
        to_device_bytes=5.5e10,
        to_host_bytes=5.4e10,
        both_to_device_bytes=4e10,
        both_to_host_bytes=3.9e10,
        attention=(line("flash", 64, 3e14), line("cudnn", 64, 5e14), line("efficient", 64, 1e14), line("flash", 128, 4e14)),
        launch_s=4e-6,
        operation_s=3e-5,
        disk_write_bytes=0.0,
        disk_read_bytes=3e9,
        left_out={"flash_attn": "flash-attn is not installed"},
    )


def test_a_profile_is_found_again(tmp_path: Path) -> None:
    written = profile_of(CARD)
    assert read(machine_of(CARD), tmp_path) is None
    write(written, tmp_path)
    assert read(machine_of(CARD), tmp_path) == written
    # Nothing is left of the file while it was written.
    assert [path.suffix for path in (tmp_path / "hardware").iterdir()] == [".json"]


def test_another_driver_is_another_machine(tmp_path: Path) -> None:
    write(profile_of(CARD), tmp_path)
    assert read(machine_of(replace(CARD, driver="590.2")), tmp_path) is None
    assert read(machine_of(RTX3090), tmp_path) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plain: "{", "no profile"),
        (lambda plain: json.dumps([plain]), "no profile"),
        (lambda plain: json.dumps({**plain, "matmul_flops": -1.0}), "matmul_flops is -1.0"),
        (lambda plain: json.dumps({**plain, "copy_bytes": None}), "copy_bytes is None"),
        (lambda plain: json.dumps({**plain, "attention": []}), "no attention kernel"),
        (lambda plain: json.dumps({**plain, "format": 99}), "another version"),
        (lambda plain: json.dumps({key: value for key, value in plain.items() if key != "launch_s"}), "launch_s"),
        (lambda plain: json.dumps({**plain, "machine": {**plain["machine"], "driver": "1"}}), "another machine"),
    ],
)
def test_a_bad_file_is_ignored_aloud(change: object, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(profile_of(CARD), tmp_path)
    assert callable(change)
    path.write_text(change(json.loads(path.read_text())))
    with caplog.at_level(logging.WARNING, logger="elite.hardware"):
        device = hardware.device(HardwareConfig(), lambda: [CARD], tmp_path)
    assert device.measured is None
    assert said in caplog.text
    assert str(path_of(machine_of(CARD), tmp_path)) in caplog.text


def test_this_machine_is_planned_with_what_was_measured(tmp_path: Path) -> None:
    write(profile_of(CARD), tmp_path)
    for config in (HardwareConfig(), hardware_config("h100"), replace(hardware_config("rtx3090"), cap=Cap.memory)):
        rates = rates_of(hardware.device(config, lambda: [CARD], tmp_path))
        assert rates.matmul_flops_per_s == IN_RUNS * 6e14
        assert rates.origin == "this machine, measured on 2026-01-02"
        # The fastest kernel, and the assumption where the disk had no room.
        assert rates.attention[64].forward == IN_RUNS * 5e14
        assert rates.disk_write_bytes_per_s == 1e9


def test_another_card_keeps_its_data_sheet(tmp_path: Path) -> None:
    write(profile_of(CARD), tmp_path)
    device = hardware.device(hardware_config("rtx4090"), lambda: [CARD], tmp_path)
    assert device.measured is None
    assert rates_of(device).origin == "the data sheet"
    unmeasured = hardware.device(HardwareConfig(), lambda: [replace(CARD, driver="other")], tmp_path)
    assert "mode=profile" in rates_of(unmeasured).origin


def test_a_card_that_stands_in_for_an_older_one_uses_its_kernels(tmp_path: Path) -> None:
    write(profile_of(CARD), tmp_path)
    emulated = hardware.device(replace(hardware_config("rtx2060s"), cap=Cap.emulate), lambda: [CARD], tmp_path)
    assert emulated.measured is not None
    assert emulated.measured.attention[64].forward == IN_RUNS * 1e14


def test_a_run_takes_longer_than_the_stress_test() -> None:
    profile = profile_of(CARD)
    # Where the host computes, too, it does not.
    cpu = replace(profile, machine=replace(profile.machine, driver=""))
    slow, fast = (measured_rates(one, None) for one in (profile, cpu))
    assert slow.operation_s == OF_RUNS * fast.operation_s == OF_RUNS * profile.operation_s
    assert slow.matmul_flops_per_s == IN_RUNS * fast.matmul_flops_per_s == IN_RUNS * profile.matmul_flops
    assert slow.attention[64].backward == IN_RUNS * fast.attention[64].backward
    assert slow.memory_bytes_per_s == fast.memory_bytes_per_s == profile.copy_bytes


def test_a_square_at_half_the_rate_is_as_long_as_its_half_rate_length() -> None:
    attention = measured_rates(profile_of(CARD), None).attention[64]
    assert (attention.forward_half, attention.backward_half) == (8192, 8192)
