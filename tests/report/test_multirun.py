"""An ablation as a user runs it: its runs from the code, one table of all, failures in it, and the same command going on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from elite.callbacks import metrics_file
from elite.runfolder import RunFolder
from tests.conftest import ROOT, Program

COMMAND = (
    "-m", "experiment=ablation", "debug=tiny", "optimizations=none", "optimizations.gradient_checkpointing.enabled=true",
    "optimizations.fused_loss.enabled=true", "training.learning_rate=1e-3,-1", "training.val_every=1000", "hydra.sweep.dir=ablation",
)  # fmt: skip


def found(sweep: Path) -> list[dict[str, Any]]:
    jobs = json.loads((sweep / "ablation.json").read_text())["jobs"]
    assert isinstance(jobs, list)
    return jobs


def _heeds_interrupts() -> None:
    # Whatever a shell starts in the background ignores them, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(folder: Path, repository: Path, cache: Path) -> None:
    """Start the ablation and stop it when the job without checkpointing has ended."""
    command = [sys.executable, str(ROOT / "train.py"), *COMMAND, f"output.cache={cache}", f"data.repo={repository}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heeds_interrupts
    )
    deadline = time.monotonic() + 200
    while not (folder / "ablation" / "3" / "job.json").exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors


@pytest.mark.faults
def test_an_ablation_goes_on_where_it_was_stopped(program: Program, tmp_path: Path, repository: Path, cache: Path) -> None:
    sweep = tmp_path / "ablation"
    interrupted(tmp_path, repository, cache)
    kept = {number: (sweep / number / "summary.json").stat().st_mtime_ns for number in "02"}
    assert [job["state"] for job in found(sweep)[:3]] == ["finished", "failed", "finished"]
    assert not (sweep / "4" / "summary.json").exists()

    done = program(*COMMAND)
    assert done.returncode == 2 and done.stderr.count("error:") == 3 and "Callback" not in done.stderr, done.stderr
    assert "6 jobs, 3 failed; side by side in" in done.stdout and done.stdout.count("finished before: ") == 2
    assert {number: (sweep / number / "summary.json").stat().st_mtime_ns for number in "02"} == kept, "nothing was trained twice"
    jobs = found(sweep)
    variants = ["all", "without_gradient_checkpointing", "without_fused_loss"]
    assert [job["label"] for job in jobs] == [f"{name} training.learning_rate={rate}" for name in variants for rate in ("0.001", "-1")]
    assert [job["state"] for job in jobs] == ["finished", "failed"] * 3
    assert [job["baseline"] for job in jobs] == ["0", "1"] * 3
    for job, exactness, limit in ((jobs[2], "EXACT", 1e-3), (jobs[4], "EQUAL", 1.5e-2)):
        assert job["against"]["part"] == job["label"].split()[0].removeprefix("without_")
        assert job["against"]["exactness"] == exactness and job["against"]["limit"] == limit and job["against"]["holds"] is True
        losses = [{line["step"]: line["loss"] for line in lines(sweep / number)} for number in ("0", job["number"])]
        assert job["against"]["largest"] == max(abs(losses[0][step] - losses[1][step]) for step in (1, 2, 3))
        difference = job["summary"]["tokens_per_s"] - jobs[0]["summary"]["tokens_per_s"]
        assert job["values"]["tokens_per_s_difference"] == difference
    table = (sweep / "ablation.md").read_text()
    assert table.count("**failed**: training.learning_rate=-1.0: must be positive and finite |") == 3
    assert "60 % fewer activations" in table and "EXACT holds (limit 0.001)" in table
    assert "<table>" in (sweep / "ablation.html").read_text()


def lines(folder: Path) -> list[dict[str, float]]:
    return [line for line in metrics_file.read(RunFolder(folder).metrics) if "loss" in line]


def test_contexts_must_not_differ(program: Program, tmp_path: Path) -> None:
    done = program("-m", "experiment=ablation", "debug=tiny", "tier.name=auto")
    assert done.returncode == 2 and "tier=auto" in done.stderr and done.stderr.count("error:") == 1
    assert not (tmp_path / "multiruns").exists()


def test_a_sweep_of_plans_has_no_table(program: Program, tmp_path: Path) -> None:
    done = program("-m", "debug=tiny", "mode=plan", "seed=0,-1", "hydra.sweep.dir=plans")
    assert done.returncode == 2 and done.stdout.count("FITS") == 1 and done.stderr.count("error:") == 1, done.stderr
    assert "Callback" not in done.stderr and not (tmp_path / "plans" / "ablation.md").exists()
