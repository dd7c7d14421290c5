"""Memory that runs out in whole runs: what they say, what they leave, and that all ranks agree."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elite import compose, modes
from elite.callbacks import metrics_file
from elite.data.batches import Batch
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.whole import WholeExecutor
from elite.runfolder import RunFolder
from elite.training import generation
from tests.conftest import ROOT, Trained
from tests.executor.test_run_streamed import final, losses

TINY = ("debug=tiny", "schedule=constant", "optimizations.mixed_precision.enabled=false")


def limited(monkeypatch: pytest.MonkeyPatch, kind: type, most: int) -> None:
    """The allocator refuses for real in training passes over more than so many tokens; a streamed one is counted in its chunks."""
    real = kind.loss_sum  # type: ignore[attr-defined]

    def loss_sum(self: Any, batch: Batch, keep: Tensor | None = None) -> Tensor:
        loss: Tensor = real(self, batch, keep)
        if keep is None and batch.input_ids.numel() > most:
            torch.empty(2**50, dtype=torch.uint8)
        return loss

    monkeypatch.setattr(kind, "loss_sum", loss_sum)


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize(
    ("kind", "executor"), [pytest.param(WholeExecutor, "whole", marks=pytest.mark.faults), (StreamedExecutor, "streamed")]
)
def test_a_run_goes_on_and_says_so(
    kind: type, executor: str, trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two rows of 256 tokens are two chunks' worth: nothing but rows is left to give up.
    request = (*TINY, f"executor={executor}", "executor.chunk=256", "training.completion_tokens=0", "training.global_batch_tokens=512")
    expected = trained(*request, "training.micro_batch=1", "output.root=undisturbed")
    limited(monkeypatch, kind, 256)
    folder = trained(*request, "training.micro_batch=2", "output.root=disturbed")
    assert losses(folder) == losses(expected)
    ours, theirs = final(folder), final(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    summary, printed = read(folder.summary), capsys.readouterr().out
    assert (summary["oom_recoveries"], summary["micro_batch"]) == (1, 1) and read(expected.summary)["oom_recoveries"] == 0
    assert summary["chunk"] == (256 if executor == "streamed" else None)
    assert (
        "out of memory; the same step is done again" in printed and "out of memory  1 times, and went on: now 1 rows in a pass" in printed
    )
    lines = [line for line in metrics_file.read(folder.metrics) if "loss" in line]
    assert all(line["oom_recoveries"] == 1 and line["micro_batch"] == 1 for line in lines)
    assert not folder.failure.exists()


@pytest.mark.faults
def test_a_completion_that_does_not_fit_is_left_out(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = trained(*TINY, "output.root=undisturbed")
    calls = 0
    real = generation.Generator.__call__

    def call(self: generation.Generator, *arguments: Any) -> list[list[int]]:
        nonlocal calls
        calls += 1
        if calls in (1, 3, 4):
            torch.empty(2**50, dtype=torch.uint8)
        return real(self, *arguments)

    monkeypatch.setattr(generation.Generator, "__call__", call)
    folder = trained(*TINY, "output.root=disturbed")
    assert "no completion after training: out of memory" in capsys.readouterr().out
    one, two = read(folder.path / "completion.json"), read(expected.path / "completion.json")
    assert "after" not in one and one == {key: two[key] for key in one} and "before" in one
    assert losses(folder) == losses(expected) and folder.finished


ONE_RANK = """
import os, sys, torch
sys.path.insert(0, {root!r})
from elite.executor.whole import WholeExecutor
real = WholeExecutor.loss_sum
def loss_sum(self, batch, keep=None):
    loss = real(self, batch, keep)
    if keep is None and os.environ["RANK"] == "1" and len(batch.input_ids) > 1:
        torch.empty(2**50, dtype=torch.uint8)
    return loss
WholeExecutor.loss_sum = loss_sum
from elite.worker import main
main()
"""


@pytest.mark.faults
def test_one_rank_of_two_runs_out_of_memory_and_both_go_on(
    tmp_path: Path, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first a step is one micro-batch of four rows, in whose backward ranks would exchange gradients."""
    monkeypatch.chdir(tmp_path)
    request = (*TINY, "training.completion_tokens=0", "training.max_steps=2", "training.global_batch_tokens=2048", "hardware.gpus=2")
    (tmp_path / "rank.py").write_text(ONE_RANK.format(root=str(ROOT)))
    (tmp_path / "plain.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); from elite.worker import main; main()")
    found = []
    for script, micro_batch in (("plain.py", 1), ("rank.py", 4)):
        composed = compose.from_overrides(
            f"data.repo={repository}", f"output.cache={cache}", *request, f"training.micro_batch={micro_batch}", f"output.root=of_{script}"
        )
        folder, _ = modes._prepare(composed)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", script, str(folder.path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        found.append(RunFolder(folder.path))
    expected, folder = found
    # Masks of dropout there are none; sums are the same ones in the same order.
    assert losses(folder) == pytest.approx(losses(expected), abs=1e-5)
    ours, theirs = final(folder), final(expected)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=name)
    summary = read(folder.summary)
    assert (summary["oom_recoveries"], summary["micro_batch"]) == (2, 1)
