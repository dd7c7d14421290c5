"""What a run tries before its first step, and what it says when memory runs out: with real runs, on a CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor

from elite import compose, modes, worker
from elite.callbacks import metrics_file
from elite.data.batches import Batch
from elite.distributed.ranks import joined
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.whole import WholeExecutor
from elite.facts import GIB
from elite.runfolder import RunFolder
from elite.training.shortage import MemoryShortage, is_out_of_memory
from tests.conftest import ROOT, Trained

Prepare = Callable[..., RunFolder]
TINY = ("debug=tiny", "training.completion_tokens=0", "adapter.dropout=0.1")


@pytest.fixture
def prepare(tmp_path: Path, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """A run planned, with its folder, not yet begun."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides: str) -> RunFolder:
        return modes._prepare(compose.from_overrides(f"output.cache={cache}", f"data.repo={repository}", *overrides))[0]

    return call


def begin(folder: RunFolder) -> None:
    with joined() as ranks:
        worker.train(folder, ranks)


def losses(folder: RunFolder) -> dict[int, tuple[float, float]]:
    return {int(line["step"]): (line["loss"], line["grad_norm"]) for line in metrics_file.read(folder.metrics) if "loss" in line}


def read(path: Path) -> dict[str, object]:
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    "variant",
    [
        (),
        ("executor=streamed", "executor.chunk=64", "training.micro_batch=2"),
        pytest.param(("executor=streamed", "executor.chunk=64"), marks=pytest.mark.slow),
        pytest.param(("seed=1",), marks=pytest.mark.slow),
    ],
)
def test_a_preflight_changes_nothing(trained: Trained, variant: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    without = trained(*TINY, *variant, "output.root=without")
    assert "preflight:" not in capsys.readouterr().out and not without.preflight.exists()
    looked = trained(*TINY, *variant, "training.preflight=true", "output.root=looked")
    assert losses(looked) == losses(without) and len(losses(looked)) == 3
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("preflight: planned"))
    assert "measured" in line and "step about" in line
    found = read(looked.preflight)
    assert found["fits"] is True and float(str(found["measured_bytes"])) > 0 and float(str(found["step_s"])) > 0


def test_a_preflight_that_does_not_fit_stops_the_run(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(*TINY, "training.preflight=true", "training.micro_batch=2")
    # What was free when the run was planned is gone when it begins.
    only(monkeypatch, 3_000_000)
    with pytest.raises(MemoryShortage) as caught:
        begin(folder)
    message, shown = str(caught.value), capsys.readouterr().out
    assert caught.value.exit_code == 2 and len(message.splitlines()) <= 3
    assert message.startswith("preflight: out of memory") and "nothing had been saved yet" in message and caught.value.remedy
    # The loss takes most, before there is a gradient.
    parts = ("weights", "optimizer state", "loss workspace", "usable")
    assert "Memory, planned and actual" in shown and all(word in shown for word in parts)
    assert not losses(folder) if folder.metrics.exists() else True
    failure = read(folder.failure)
    assert failure["checkpoint"] is None and set(failure) >= {"planned", "actual", "remedy", "usable_bytes"}


def only(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    """So many bytes of this machine are free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=GIB, available=available))


def no_room(monkeypatch: pytest.MonkeyPatch, kind: type, at: int) -> None:
    """The allocator refuses for real from the `at`-th training pass of an executor on."""
    real, passes = kind.loss_sum, 0  # type: ignore[attr-defined]

    def loss_sum(self: object, batch: Batch, keep: Tensor | None = None) -> Tensor:
        nonlocal passes
        passes += keep is None
        if passes >= at and keep is None:
            torch.empty(2**50, dtype=torch.uint8)
        result: Tensor = real(self, batch, keep)
        return result

    monkeypatch.setattr(kind, "loss_sum", loss_sum)


@pytest.mark.parametrize(("kind", "executor"), [(WholeExecutor, "whole"), (StreamedExecutor, "streamed")])
def test_running_out_of_memory_says_what_was_planned_and_keeps_the_checkpoint(
    prepare: Prepare,
    trained: Trained,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: type,
    executor: str,
) -> None:
    request = (*TINY, f"executor={executor}", "training.max_steps=4", "training.val_every=4")
    expected = trained(*request, "output.root=whole")
    folder = prepare(*request)
    # Two micro-batches a step: the sixth pass is in step 3, after the checkpoint of step 2.
    with monkeypatch.context() as patch:
        no_room(patch, kind, at=6)
        with pytest.raises(MemoryShortage) as caught:
            begin(folder)
    message, shown = str(caught.value), capsys.readouterr().out
    assert caught.value.exit_code == 2 and len(message.splitlines()) <= 3
    assert "after step 2" in message and "1,048,576.00 GiB more refused" in message and "step_000002 is intact" in message
    assert "Memory, planned and actual" in shown and "refused" in shown
    failure = read(folder.failure)
    assert (failure["step"], failure["checkpoint"]) == (2, "step_000002") and not folder.finished
    actual = failure["actual"]
    assert isinstance(actual, dict) and actual["requested"] == 2**50 and actual["weights"] > 0 and actual["optimizer_state"] > 0
    begin(folder)
    assert folder.finished and not folder.failure.exists() and losses(folder) == losses(expected)


def test_a_process_whose_memory_is_limited_ends_with_the_breakdown(prepare: Prepare) -> None:
    """The system itself refuses: 64 MiB of logits at a time, where as much address space is left for everything."""
    folder = prepare(*TINY, "model.vocab_size=65536", "adapter.method=full", "training.micro_batch=2", "training.val_every=9")
    program = (
        "import sys, resource, psutil, torch\n"
        # Which of torch and oneDNN is refused first is chance; only torch says how much, and oneDNN may end the process there.
        "torch.backends.mkldnn.set_flags(False)\n"
        "from elite import worker\n"
        "def limited(*_):\n"
        "    size = psutil.Process().memory_info().vms + 64 * 2**20\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "worker.Trainer._validate = lambda self: False\n"
        "worker.rehearsal.checked = limited\n"
        "worker.main()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(folder.path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1 and "GiB more refused" in done.stderr and "remedy:" in done.stderr
    assert "Memory, planned and actual" in done.stdout and folder.failure.is_file() and not folder.finished


def test_other_errors_are_not_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert is_out_of_memory(RuntimeError("could not create a primitive"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a matmul primitive"))


def test_a_micro_batch_is_found_and_kept(prepare: Prepare, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    auto = (*TINY, "training.micro_batch=auto", "training.global_batch_tokens=4096", "training.lr_scaling=sqrt", "plan.headroom_fraction=0")
    folder = prepare(*auto)
    assert read(folder.plan)["largest_micro_batch"] == 16
    assert "(at most 16 fit)" in capsys.readouterr().out
    only(monkeypatch, 8_000_000)
    with monkeypatch.context() as patch:
        no_room(patch, WholeExecutor, at=10**6)
        begin(folder)
    found, plan, summary = read(folder.micro_batch), read(folder.plan), read(folder.summary)
    largest, trials = found["largest"], found["trials"]
    assert isinstance(trials, list) and len(trials) <= 8 and found["proven"] is True
    assert isinstance(largest, int) and 1 < largest < 16 and any(trial["out_of_memory"] for trial in trials)
    chosen = plan["micro_batch"]
    assert isinstance(chosen, int) and chosen <= largest and 16 % chosen == 0 and plan["accumulation"] == 16 // chosen
    assert plan["step_tokens"] == 4096 and summary["tokens"] == 3 * 4096 and summary["micro_batch"] == chosen
    assert summary["learning_rate"] == pytest.approx(2e-4 / 4)
    assert f"micro-batch: {largest} sequences fit" in capsys.readouterr().out
    rates = [line["lr"] for line in metrics_file.read(folder.metrics) if "lr" in line]
    assert max(rates) <= 5e-5 + 1e-12


def test_a_continued_run_keeps_its_micro_batch(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = (*TINY, "training.micro_batch=auto", "training.global_batch_tokens=1024", "training.checkpoint_every=1")
    folder = prepare(*auto)
    with monkeypatch.context() as patch:
        # One probe of the search, then a pass a step.
        no_room(patch, WholeExecutor, at=4)
        with pytest.raises(MemoryShortage):
            begin(folder)
    before = folder.micro_batch.read_text()
    assert len(losses(folder)) == 2
    only(monkeypatch, 8_000_000)
    begin(folder)
    assert folder.finished and folder.micro_batch.read_text() == before and len(losses(folder)) == 3


def test_a_micro_batch_of_which_not_one_sequence_fits(prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(*TINY, "training.micro_batch=auto")
    only(monkeypatch, 1_000_000)
    with pytest.raises(MemoryShortage) as caught:
        begin(folder)
    assert "before the first step, out of memory" in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_a_summary_says_how_far_the_plan_was_off(trained: Trained) -> None:
    summary = read(trained(*TINY).summary)
    errors = summary["errors_percent"]
    assert isinstance(errors, dict)
    for name, predicted, measured in (("peak", "predicted_peak_bytes", "measured_peak_bytes"), ("step", "predicted_step_s", "step_s")):
        one, other = float(str(summary[predicted])), float(str(summary[measured]))
        assert errors[name] == pytest.approx(100 * (one - other) / other)
    assert errors["host_pinned"] is None and summary["host_pinned_bytes"] == 0
    # A CPU has no allocator that reserves.
    assert errors["reserved"] is None and summary["predicted_reserved_bytes"] is None and summary["reserved_peak_bytes"] == 0
