"""A grid measured for real, on a CPU with tiny models: rows, misses, reruns, caps."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elite import compose, geometry, hardware, modes
from elite.bench.assemble import assembled
from elite.bench.calibrate import clock, host, measure
from elite.bench.calibrate.__main__ import main
from elite.bench.calibrate.caps import CAPPED_STEPS, MARGINS, capped, margins
from elite.bench.calibrate.clock import are_alike, counted, disturbed, host_s, step_here_s
from elite.bench.calibrate.grid import Request, grid, left, one_of
from elite.bench.calibrate.host import DriverMemory, ResidentMemory, Sampled
from elite.bench.calibrate.measure import SMALL, WARM, WATCHED, Machine, in_gaps, measured, timed_again
from elite.bench.calibrate.sample import CPU, Drawn, draw, stand_in
from elite.errors import ConfigError
from elite.facts import GIB, NO_CORPUS
from elite.plan import make_plan
from elite.plan.rates import CPU_OPERATION_S, rates_of
from elite.report.calibration import Row, errors

WHOLE = (
    "model=llama31_8b",
    "model.weights=random",
    "model.num_hidden_layers=2",
    *CPU.geometry,
    "tier=tier1",
    "tier.context=256",
    "tier.target_length=64",
    "training.micro_batch=2",
    "training.global_batch_tokens=512",
    "hardware=cpu",
    "adapter.method=full",
    "adapter.rank=8",
    "executor=whole",
    "optimizations.mixed_precision.enabled=false",
)


@pytest.fixture(autouse=True)
def _a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are never alike."""
    monkeypatch.setattr(clock, "LONGEST_S", 0.2)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_a_grid_and_its_reruns(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = Request(tmp_path / "new" / "grid.json", seed=3, count=3, space="cpu", cache=str(cache))
    grid(replace(request, seconds=0.0))
    begun = json.loads(request.file.read_text())
    # Something is begun before so little time is over, or nothing; a rerun does the rest.
    assert len(left(begun)) >= 2 and len(begun["configurations"]) == 3
    found = grid(request)
    assert json.loads(request.file.read_text()) == json.loads(json.dumps(found))
    assert [run["name"] for run in found["runs"]] == ["00", "01", "02"] and found["device"] == "CPU"
    for run in found["runs"]:
        assert run["outcome"] == "ran" and len(run["steps"]) == WATCHED
        steps = run["timed"]
        assert not are_alike(steps[:-1]) and (are_alike(steps) or run["seconds"] >= clock.LONGEST_S)
        assert all(run["measured"][name] == median(step[name] for step in counted(steps)) for name in ("step_s", "operation_s"))
        # Random tokens of a random model: a guess among 512.
        assert all(step["loss"] == pytest.approx(6.24, abs=0.5) and step["step_s"] > 0 for step in run["steps"])
        parts = [step["allocated_by_part"] for step in run["steps"]]
        assert all(set(part) == {"forward", "backward"} for part in parts)
        assert run["measured"]["allocated_bytes"] == max(value for part in parts for value in part.values())
        assert sum(run["predicted"]["memory"].values()) == pytest.approx(run["predicted"]["allocated_bytes"])
        assert run["predicted"]["reserved_bytes"] is None and run["measured"]["host_rss_bytes"] > 0
    shown = capsys.readouterr().out
    assert "the same command goes on" in shown and "3 configurations: 3 ran, 0 ran out of memory, 0 failed" in shown
    runs = len(found["runs"])
    assert len(grid(request)["runs"]) == runs
    with pytest.raises(ConfigError, match="holds another draw"):
        grid(replace(request, seed=4))


@pytest.mark.parametrize(
    ("seconds", "alike", "fastest"),
    [
        ([], False, []),
        ([0.01, 0.01], False, [0.01, 0.01]),
        ([0.01, 0.01, 0.0104], True, [0.01, 0.01, 0.0104]),
        ([0.03, 0.01, 0.0104], False, [0.01, 0.0104, 0.03]),
        ([0.03, 0.01, 0.0104, 0.0102], True, [0.01, 0.0102, 0.0104]),
        # They need not follow each other.
        ([0.01, 0.03, 0.0104, 0.03, 0.0102], True, [0.01, 0.0102, 0.0104]),
        ([0.03, 0.01, 0.02, 0.03, 0.01], False, [0.01, 0.01, 0.02]),
    ],
)
def test_the_fastest_steps_count(seconds: list[float], alike: bool, fastest: list[float]) -> None:
    steps = [{"step_s": value} for value in seconds]
    assert are_alike(steps) is alike and [step["step_s"] for step in counted(steps)] == fastest


@pytest.mark.parametrize(("executor", "chunk"), [("executor=whole", None), ("executor=streamed", measure.FEW // 4)])
def test_a_rehearsal_is_the_same_configuration_at_few_tokens(executor: str, chunk: int | None) -> None:
    """So that it compiles the same kernels, those that join chunks among them."""
    sized = ("tier.context=65536", "training.global_batch_tokens=131072", "training.micro_batch=2", "executor.chunk=4096")
    others = ("model=phi2", "hardware=h100", "adapter.rank=4", "optimizations.fused_kernels.enabled=true", executor)
    drawn = measure.at_few_tokens(Drawn("00", (*others, *sized)))
    config = compose.from_overrides(*drawn.overrides).config
    assert (drawn.name, config.tier.context, config.training.micro_batch, config.executor.chunk) == ("00", measure.FEW, 1, chunk)
    assert set(others) <= set(drawn.overrides) and not set(sized) & set(drawn.overrides)


@pytest.mark.parametrize(("slower", "longer"), [(1.0, False), (1000.0, True)])
def test_steps_are_timed_on_while_the_host_is_slower_than_was_measured(
    cache: Path, monkeypatch: pytest.MonkeyPatch, slower: float, longer: bool
) -> None:
    """Where nothing was measured nobody knows how fast it is."""
    config = compose.from_overrides(*WHOLE, f"output.cache={cache}").config
    with assembled(config) as made:
        steps = [{"step_s": 1.0, "operation_s": slower * CPU_OPERATION_S}] * clock.ALIKE
        assert not disturbed(made, steps)
        device = hardware.device(made.config.hardware)
        monkeypatch.setattr(clock, "_device", lambda _: replace(device, measured=rates_of(device)))
        assert disturbed(made, steps) is longer


def test_the_host_decides_which_of_two_timings_counts(machine: Machine, cache: Path) -> None:
    """And its pace alone: neither a step that was faster nor one that was slower is kept for that."""
    row = measured(Drawn("00", WHOLE), machine, str(cache))
    assert row["disturbed"] is False and "timed_before" not in row
    for operation_s, again in ((1.0, True), (0.0, False)):
        first = [{"step_s": 1e-6, "operation_s": operation_s, "alloc_retries": 0}]
        row |= {"timed": first, "timed_before": [], "measured": row["measured"] | {"step_s": 1e-6}}
        timed_again(row, machine, str(cache))
        assert (row["timed"] != first, row["timed_before"] == [first]) == (again, again)
        assert row["measured"]["step_s"] == median(step["step_s"] for step in counted(row["timed"]))
        assert not again or row["measured"]["operation_s"] == host_s(row["timed"]) < operation_s
    lost = row | {"overrides": [*WHOLE, "tier.context=100"]}
    timed_again(lost, machine, str(cache))
    assert (row["outcome"], lost["outcome"]) == ("ran", "error")


def test_a_grid_times_anew_what_others_slowed(tmp_path: Path, cache: Path) -> None:
    request = Request(tmp_path / "grid.json", seed=3, count=2, space="cpu", cache=str(cache))
    found = grid(request)
    for run, slowed in zip(found["runs"], (True, False), strict=True):
        run["disturbed"], run["timed"] = slowed, [{"step_s": 1.0, "operation_s": 1.0}]
    request.file.write_text(json.dumps(found))
    runs = grid(request)["runs"]
    assert ["timed_before" in run for run in runs] == [True, False] and not any(run["disturbed"] for run in runs)
    assert json.loads(request.file.read_text())["runs"] == json.loads(json.dumps(runs))


def test_a_step_is_planned_for_the_host_as_it_was(cache: Path) -> None:
    """Twice as slow a host, twice the time of a step that only waits for it; as fast a one as the plan's, the plan's own time."""
    config = compose.from_overrides(*WHOLE, f"output.cache={cache}").config
    with assembled(config) as made:
        planned = step_here_s(made, CPU_OPERATION_S)
        assert planned == pytest.approx(made.plan.step_s)
        slow = [step_here_s(made, factor * CPU_OPERATION_S) for factor in (1000, 2000)]
    assert slow[1] == pytest.approx(2 * slow[0], rel=0.01)


def test_live_bytes_agree_with_the_plan(machine: Machine, cache: Path) -> None:
    """Weights, gradients, moments and activations of a whole pass over everything: what the plan counts, a sixth either way."""
    row = measured(Drawn("00", WHOLE), machine, str(cache))
    weights = sum(4 * p.numel() for p in _model().parameters())
    assert row["outcome"] == "ran" and row["measured"]["allocated_bytes"] > 4 * weights
    assert abs(errors(Row.of(row))["allocated"]) < 1 / 6


def _model() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_config(geometry.hf_config(compose.from_overrides(*WHOLE).config.model))
    return model


@pytest.mark.parametrize("overrides", WARM, ids=" ".join)
def test_what_warms_a_machine_would_run(overrides: tuple[str, ...]) -> None:
    config = compose.from_overrides(*SMALL, *overrides).config
    made = make_plan(config, stand_in(config, "h100"), geometry.shape(config.model), NO_CORPUS)
    # Liger and Triton are for GPUs.
    missing = [
        one.name for one in made.decisions if one.requested and not one.active and f"optimizations.{one.name}.enabled=true" in overrides
    ]
    assert made.fits and set(missing) <= {"liger_kernels", "fused_kernels"}


def test_failures_are_rows(machine: Machine, cache: Path) -> None:
    broken = measured(Drawn("00", (*WHOLE, "tier.context=100")), machine, str(cache))
    assert broken["outcome"] == "error" and broken["error"].startswith("PlanError: tier.context=100")
    tight = capped(Drawn("01", WHOLE), -0.5, machine, "needed", str(cache))
    assert tight["outcome"] == "oom" and tight["as_planned"] and tight["cap_around"] == "allocated"
    assert tight["predicted"]["allocated_bytes"] / 2 == pytest.approx(tight["cap_bytes"])
    ample = capped(Drawn("02", WHOLE), 0.5, machine, "needed", str(cache))
    assert ample["outcome"] == "ran" and ample["as_planned"] and len(ample["steps"]) == CAPPED_STEPS
    assert "in_gaps_bytes" not in tight
    assert not capped(Drawn("03", (*WHOLE, "tier.context=100")), 0.05, machine, "needed", str(cache))["as_planned"]


def test_what_lay_in_gaps_is_read_from_torchs_words() -> None:
    words = (
        "CUDA out of memory. Tried to allocate 2.00 MiB. Of the allocated memory 1.21 GiB is allocated by PyTorch, and {} {} is reserved"
    )
    for number, unit, size in (("96.77", "MiB", 96.77 * 2**20), ("1.50", "GiB", 1.5 * 2**30), ("512", "bytes", 512.0)):
        assert in_gaps(f"{words.format(number, unit)} by PyTorch but unallocated. If") == size
    assert in_gaps("512 bytes of tensors at once") is None


def test_caps_lie_on_both_sides() -> None:
    found = margins(2, 20)
    assert found == margins(2, 20) != margins(3, 20)
    assert sum(margin > 0 for margin in found) == 10 and all(MARGINS[0] <= abs(margin) <= MARGINS[1] for margin in found)
    assert len(set(found)) == 20


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `python -m elite.bench.calibrate`."""
    monkeypatch.setattr(sys, "argv", ["calibrate", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.slow
def test_one_in_its_own_process(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # For the child, which shares the machine with the suite.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "grid.json"
    given = (str(file), "--space", "cpu", "--count", "1", "--seed", "fit", "--cache", str(cache))
    assert command(monkeypatch, *given, "--list") == 0
    assert json.loads(file.read_text())["runs"] == []
    assert command(monkeypatch, *given, "--fresh") == 0
    found = json.loads(file.read_text())
    assert found["draw"]["seed"] == 1 and [run["outcome"] for run in found["runs"]] == ["ran"]
    with pytest.raises(ConfigError, match="not among the configurations left"):
        one_of(file, "00")


def test_a_process_that_is_lost_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = grid(Request(tmp_path / "grid.json", seed=1, count=1, space="cpu", fresh=True))
    assert [(run["outcome"], run["error"]) for run in found["runs"]] == [("error", "its process ended with 1")]
    assert not left(json.loads((tmp_path / "grid.json").read_text()))


def test_the_command_under_caps(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "caps.json"
    assert command(monkeypatch, str(file), "--caps", "--space", "cpu", "--count", "2", "--cache", str(cache)) == 0
    found = json.loads(file.read_text())
    assert sorted(run["expected"] for run in found["runs"]) == [False, True]
    assert all(run["outcome"] in ("ran", "oom") and abs(run["margin"]) >= MARGINS[0] for run in found["runs"])
    assert "of 2 as planned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "no FILE"), (("--seed", "some"), "must be a number"), (("grid.json", "--count", "0"), "must be positive")],
    ids=["file", "seed", "count"],
)
def test_bad_input_is_refused(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err


def test_the_mode(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "calibration.json"
    options = "calibrate.count=2", "calibrate.seed=9", f"calibrate.file={file}", f"output.cache={cache}"
    modes.run(compose.from_overrides("mode=calibrate", "hardware=cpu", *options))
    found = json.loads(file.read_text())
    assert [one["name"] for one in found["configurations"]] == [run["name"] for run in found["runs"]] == ["00", "01"]
    assert found["configurations"] == [one.to_dict() for one in draw(9, 2, CPU)]
    assert "median" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"calibrate\.count=0"):
        modes.run(compose.from_overrides("mode=calibrate", "hardware=cpu", "calibrate.count=0"))


def test_resident_memory_grows_with_what_is_touched() -> None:
    with ResidentMemory() as resident:
        block = torch.ones(GIB // 16, dtype=torch.float32)
        del block
    # Freed again before it is read: the peak stays.
    assert 0.24 * GIB < resident.growth < 0.4 * GIB


def test_what_comes_aside_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    for by_kernel in (True, False):
        if not by_kernel:
            monkeypatch.setattr(host, "_reset", lambda: False)
        with ResidentMemory() as resident:
            before = torch.ones(GIB // 32, dtype=torch.float32)
            time.sleep(4 * host.EVERY_S)
            with resident.aside():
                aside = torch.ones(GIB // 16, dtype=torch.float32)
                time.sleep(4 * host.EVERY_S)
                del aside
            after = torch.ones(GIB // 64, dtype=torch.float32)
            time.sleep(4 * host.EVERY_S)
        assert 0.17 * GIB < resident.growth < 0.27 * GIB, by_kernel
        del before, after


def test_the_highest_sample_counts() -> None:
    values = iter([3.0, 9.0, 4.0])
    with Sampled(lambda: next(values, 1.0)) as sampled:
        pass
    assert sampled.peak == 9.0


class Driver:
    """A driver with one card, on which others use 3 GiB and this process, once it works, 2."""

    class NVMLError(Exception):
        """What the library raises."""

    def __init__(self, processes: list[Any] | None) -> None:
        self.processes, self.used = processes, 3 * GIB

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-1"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        if self.processes is None:
            raise self.NVMLError
        return self.processes


def process(pid: int, used: int | None) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=used)


def test_the_drivers_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    own, foreign = process(os.getpid(), 2 * GIB), process(-1, 3 * GIB)
    cases: list[tuple[list[Any] | None, str]] = [
        ([foreign, own], "process"),
        # Under another number.
        ([process(-1, 2 * GIB)], "process"),
        ([process(os.getpid(), None)], "total"),
        ([foreign, process(-2, 2 * GIB)], "total"),
        (None, "total"),
    ]
    for processes, method in cases:
        driver = Driver(processes)
        found = DriverMemory(driver)
        driver.used += 2 * GIB
        found.settle()
        assert (found.method, found.read()) == (method, 2 * GIB), processes
        driver.used += GIB
        assert found.read() == 3 * GIB
