import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elite import hardware
from elite.config import Cap, HardwareConfig
from elite.errors import ConfigError, PlanError
from elite.facts import GIB
from elite.hardware import Gpu
from elite.hardware.detect import link_rate
from elite.hardware.resolve import CPU_BF16, CPU_BF16_FLOPS_PER_CORE_S, CPU_FLOPS_PER_CORE_S
from tests.plan.helpers import hardware_config, hardware_names

H100 = Gpu("NVIDIA H100 80GB HBM3", 85_520_809_984, 85_000_000_000, (9, 0))
RTX3090 = Gpu("NVIDIA GeForce RTX 3090", 24576 * 1024**2, 24000 * 1024**2, (8, 6))
RTX3060_TI = Gpu("NVIDIA GeForce RTX 3060 Ti", 8192 * 1024**2, 8000 * 1024**2, (8, 6))
UNKNOWN = Gpu("NVIDIA RTX A5000", 24564 * 1024**2, 24000 * 1024**2, (8, 6))


def test_every_preset_describes_a_card() -> None:
    assert set(hardware.presets()) == set(hardware_names()) - {"auto", "cpu"}
    for name, config in hardware.presets().items():
        device = hardware.device(config, lambda: [])
        assert (device.name, device.kind, device.present, device.count) == (name, "cuda", False, 1)
        assert 0 < device.memory_usable_bytes < device.memory_total_bytes
        assert device.supports_bf16 == (name != "rtx2060s")


def test_usable_memory_leaves_context_and_display() -> None:
    assert hardware.device(hardware_config("rtx2060s"), lambda: []).memory_usable_bytes / GIB == pytest.approx(7.0)
    assert hardware.device(hardware_config("rtx3090"), lambda: []).memory_usable_bytes / GIB == pytest.approx(22.5)


def test_auto_without_a_gpu_is_the_cpu() -> None:
    device = hardware.device(HardwareConfig(), lambda: [])
    assert (device.kind, device.present, device.compute_capability) == ("cpu", True, None)
    assert 0 < device.memory_usable_bytes <= device.memory_total_bytes
    assert device.cores >= 1


def test_cpu_ignores_gpus() -> None:
    assert hardware.device(hardware_config("cpu"), lambda: [H100]).kind == "cpu"


@pytest.mark.parametrize("has", [(), ("_is_amx_tile_supported",), ("_is_avx512_bf16_supported",)], ids=["AVX2", "AMX", "AVX-512"])
def test_a_cpu_computes_in_bf16_where_that_is_faster(has: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for probe in CPU_BF16:
        monkeypatch.setattr(torch.cpu, probe, lambda probe=probe: probe in has, raising=False)
    device = hardware.device(hardware_config("cpu"), lambda: [])
    assert device.supports_bf16 == bool(has)
    assert device.matmul_flops_per_s == device.cores * (CPU_BF16_FLOPS_PER_CORE_S if has else CPU_FLOPS_PER_CORE_S)


def test_auto_takes_all_gpus_and_their_free_memory() -> None:
    busy = replace(H100, free_bytes=10 * GIB)
    device = hardware.device(HardwareConfig(), lambda: [H100, busy])
    assert (device.name, device.count, device.present) == (H100.name, 2, True)
    assert device.memory_usable_bytes == 10 * GIB - hardware.context_bytes()
    assert device.matmul_flops_per_s == 989e12


def test_rates_follow_the_name_then_memory_then_the_generation() -> None:
    assert hardware.rates(Gpu("NVIDIA A100-SXM4-80GB", 80 * GIB, 80 * GIB, (8, 0))).name == "a100_80gb"
    assert hardware.rates(Gpu("NVIDIA A100-PCIE-40GB", 40 * GIB, 40 * GIB, (8, 0))).name == "a100_40gb"
    assert hardware.rates(UNKNOWN).name == "rtx3060"
    assert hardware.rates(Gpu("Tesla V100", 16 * GIB, 16 * GIB, (7, 0))).name == "rtx2060s"


def test_a_preset_is_present_on_its_own_card_only() -> None:
    config = hardware_config("rtx3090")
    assert hardware.device(config, lambda: [RTX3090]).present
    assert not hardware.device(config, lambda: [UNKNOWN]).present
    assert not hardware.device(config, lambda: [H100]).present
    assert not hardware.device(hardware_config("rtx3060"), lambda: [RTX3060_TI]).present


def test_a_cap_holds_a_larger_card_to_the_preset() -> None:
    config = replace(hardware_config("rtx3090"), cap=Cap.memory)
    device = hardware.device(config, lambda: [H100])
    assert (device.present, device.capped) == (True, True)
    assert device.memory_usable_bytes / GIB == pytest.approx(22.5)
    assert device.matmul_flops_per_s == 989e12
    assert not hardware.device(config, lambda: [RTX3060_TI]).present


def test_launching_needs_the_card() -> None:
    config = hardware_config("rtx3090")
    absent = hardware.device(config, lambda: [H100])
    with pytest.raises(PlanError, match=r"hardware=rtx3090 is not in this machine \(found: NVIDIA H100 80GB HBM3\)") as caught:
        hardware.require_present(absent, config, lambda: [H100])
    assert "hardware.cap=memory" in caught.value.remedy
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(PlanError, match="found: no CUDA GPU") as caught:
        hardware.require_present(absent, config, lambda: [])
    assert "cap" not in caught.value.remedy
    hardware.require_present(hardware.device(config, lambda: [RTX3090]), config, lambda: [RTX3090])


def test_launching_needs_as_many_gpus_as_asked_for() -> None:
    config = replace(hardware_config("rtx3090"), gpus=2)
    device = hardware.device(config, lambda: [RTX3090])
    assert device.count == 2
    with pytest.raises(PlanError, match="hardware.gpus=2, but this machine shows 1"):
        hardware.require_present(device, config, lambda: [RTX3090])
    hardware.require_present(device, config, lambda: [RTX3090], local=1)
    with pytest.raises(PlanError, match="the launcher started 2 ranks on this machine, which shows 1 GPUs"):
        hardware.require_present(device, config, lambda: [RTX3090], local=2)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (HardwareConfig(cap=Cap.memory), "needs a preset"),
        (HardwareConfig(gpus=-1), "must not be negative"),
        (HardwareConfig(name="mine"), "hardware.memory_gib=0.0: must be positive"),
        (replace(hardware_config("h100"), reserve_gib=90), "leaves nothing"),
        (replace(hardware_config("h100"), compute_capability="hopper"), "not of the form 8.6"),
    ],
)
def test_contradictory_figures_are_refused(config: HardwareConfig, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        hardware.device(config, lambda: [H100])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [(None, [0, 1, 2]), ("", []), ("-1", []), ("2,0", [2, 0]), ("GPU-bb", [1]), ("0,7,1", [0]), ("1,1", [1])],
)
def test_cuda_visible_devices_is_respected(setting: str | None, expected: list[int]) -> None:
    assert hardware.visible(["GPU-aa", "GPU-bb", "GPU-cc"], setting) == expected


def test_a_link_is_as_fast_as_its_generation_and_width() -> None:
    assert link_rate(4, 16) == pytest.approx(2 * link_rate(4, 8))
    assert 23e9 < link_rate(4, 16) < 31.5e9
    assert link_rate(99, 16) == 0
    device = hardware.device(HardwareConfig(), lambda: [replace(RTX3090, link_bytes_per_s=link_rate(4, 4))])
    assert device.host_link_bytes_per_s == link_rate(4, 4)
    assert hardware.device(HardwareConfig(), lambda: [RTX3090]).host_link_bytes_per_s == 24e9


def test_free_disk_is_that_of_the_cache(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    device = hardware.device(HardwareConfig(), lambda: [], tmp_path / "not" / "there")
    assert device.disk_free_bytes == pytest.approx(free, rel=0.05)
    assert hardware.device(hardware_config("rtx3090"), lambda: [], tmp_path).disk_free_bytes == 0
