"""The program as a user runs it: plan, train, stop, continue, sweep; with real libraries."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from elite import pretrained
from elite.callbacks import metrics_file
from elite.report import measurement, tables
from elite.runfolder import RunFolder
from tests.conftest import ROOT, Program, Trained
from tests.models import tiny

STEP_FIELDS = {
    "step", "tokens", "loss", "grad_norm", "lr", "context", "tokens_per_s", "tflops", "mfu",
    "gpu_peak_bytes", "gpu_reserved_bytes", "host_rss_bytes", "step_time_s", "skipped_steps", "spikes", "rewinds",
    "checkpoint_blocked_s", "checkpoint_s",
}  # fmt: skip


def only_run(root: Path) -> RunFolder:
    (identity,) = (root / "runs").glob("*/*/run.json")
    return RunFolder(identity.parent)


def adapter(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.final / "adapter_model.safetensors")


def losses(folder: RunFolder) -> dict[int, float]:
    return {int(line["step"]): line["loss"] for line in metrics_file.read(folder.metrics) if "loss" in line}


def test_a_run_leaves_everything_it_promises(program: Program, tmp_path: Path) -> None:
    done = program("debug=tiny", "logger=wandb")
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path)
    assert "FITS" in done.stdout and "wandb sync" in done.stdout and str(folder.path) in done.stdout
    for path in (folder.config, folder.plan, folder.environment, folder.identity, folder.metrics, folder.summary):
        assert path.is_file(), path
    steps = [line for line in metrics_file.read(folder.metrics) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3] and all(set(line) == STEP_FIELDS for line in steps)
    validations = [line["step"] for line in metrics_file.read(folder.metrics) if "val_loss" in line]
    assert validations == [0, 2, 3]
    summary = json.loads(folder.summary.read_text())
    assert summary["steps"] == 3 and summary["measured_peak_bytes"] > 0 and summary["predicted_peak_bytes"] > 0
    assert {"val_loss", "val_loss_alone"} <= set(summary["val_first"]) and summary["tokens_per_s"] > 0
    assert set(json.loads((folder.path / "completion.json").read_text())) == {"path", "prompt_end", "reference", "before", "after"}
    environment = json.loads(folder.environment.read_text())
    assert environment["versions"]["torch"] == torch.__version__ and environment["device"]["kind"] == "cpu"
    assert "step_000003" in {path.name for path in folder.checkpoints.iterdir()}
    assert any(tensor.abs().max() > 0 for name, tensor in adapter(folder).items() if "lora_B" in name)
    (offline,) = (folder.path / "wandb").glob("offline-run-*/*.wandb")
    history = wandb_history(offline)
    assert {"train/loss", "train/lr", "perf/tokens_per_s", "mem/host_rss_gib"} <= set(history[-1]) | set(history[0]) | set(history[1])
    written = measurement.write("sample", [folder.path], tmp_path)
    text = tables.filled("<!-- table: sample -->\nold\n<!-- end -->", tmp_path)
    assert "old" not in text and "random weights" in text and json.loads(written.read_text())["runs"][0]["metrics"]


def wandb_history(file: Path) -> list[dict[str, object]]:
    """What W&B itself reads back from an offline run."""
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "leet", "inspect", "--json", file], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [record["history"]["item"] for record in records if record.get("type") == "history"]


def wait_for_lines(root: Path, process: subprocess.Popen[str], lines: int) -> None:
    """Until the run under `root` has written so many lines of metrics."""
    deadline = time.monotonic() + 120
    while sum(len(path.read_text().splitlines()) for path in root.glob("runs/*/*/metrics.jsonl")) < lines:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.faults
def test_a_killed_run_continues_bit_for_bit(program: Program, trained: Trained, tmp_path: Path, repository: Path, cache: Path) -> None:
    request = (
        "debug=tiny",
        "training.max_steps=40",
        "training.val_every=20",
        "data.order=shuffled",
        "adapter.dropout=0.1",
        "training.completion_tokens=0",
    )
    expected = trained(*request, "output.root=whole")

    command = [sys.executable, str(ROOT / "train.py"), f"data.repo={repository}", f"output.cache={cache}", *request]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path, process, 6)
    (worker,) = (child for child in psutil.Process(process.pid).children() if "elite.worker" in " ".join(child.cmdline()))
    worker.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 137 and "the same command continues" in errors and "Traceback" not in errors, errors
    folder = only_run(tmp_path)
    assert not folder.finished
    again = program(*request)
    assert again.returncode == 0, again.stderr
    assert "continuing the interrupted run" in again.stdout
    assert only_run(tmp_path).finished
    assert losses(folder) == losses(expected)
    one, two = adapter(folder), adapter(expected)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_signal_saves_and_the_same_command_continues(tmp_path: Path, repository: Path, cache: Path) -> None:
    command = [
        sys.executable, str(ROOT / "train.py"), f"data.repo={repository}", f"output.cache={cache}", "debug=tiny",
        "training.max_steps=400", "training.checkpoint_every=1000", "training.val_every=1000", "training.completion_tokens=0",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path, process, 5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors and errors.count("interrupted") == 1
    folder = only_run(tmp_path)
    (checkpoint,) = folder.checkpoints.glob("step_*")
    reached = int(checkpoint.name.removeprefix("step_"))
    assert 0 < reached < 400 and reached == max(losses(folder))


def test_a_multirun_gives_each_job_a_process_folder_and_tracker(program: Program, tmp_path: Path) -> None:
    done = program(
        "-m", "debug=tiny", "logger=wandb", "optimizations.gradient_checkpointing.enabled=true,false", "training.completion_tokens=0"
    )
    assert done.returncode == 0, done.stderr
    folders = sorted((tmp_path / "multiruns").glob("*/*/[01]"))
    assert [folder.name for folder in folders] == ["0", "1"] and all(RunFolder(folder).finished for folder in folders)
    assert len({file.name for folder in folders for file in (folder / "wandb").glob("offline-run-*/*.wandb")}) == 2
    (summary,) = (folders[0].parent / "wandb").glob("offline-run-*/files/media/table/jobs*.json")
    table = json.loads(summary.read_text())
    (peaks,) = ([row[i] for row in table["data"]] for i, name in enumerate(table["columns"]) if name == "peak_gib")
    assert len(peaks) == 2 and all(peak > 0 for peak in peaks) and "EXACT holds" in (folders[0].parent / "ablation.md").read_text()
    one, two = (losses(RunFolder(folder)) for folder in folders)
    assert one == pytest.approx(two, abs=1e-3), "checkpointing is EXACT"
    applied = [json.loads((folder / "summary.json").read_text())["applied"] for folder in folders]
    assert "gradient_checkpointing" in applied[0] and "gradient_checkpointing" not in applied[1]


def test_two_ranks_train_like_one(trained: Trained, tmp_path: Path, repository: Path, cache: Path) -> None:
    found = ["training.micro_batch=auto", "training.global_batch_tokens=1024", "training.preflight=true"]
    # Noise must be the same on all ranks, or their weights part.
    around = ["optimizations.ema.enabled=true", "optimizations.gradient_noise.enabled=true", "optimizations.gradient_noise.eta=1e-6"]
    request = ["debug=tiny", "training.completion_tokens=0", "training.max_steps=3", *found, *around]
    trained(*request, "output.root=alone")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port=29731"]
    script = [str(ROOT / "train.py"), f"data.repo={repository}", f"output.cache={cache}", *request, "output.root=pair", "hardware.gpus=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*launcher, *script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    one, two = (RunFolder(next((tmp_path / root).glob("*/*/run.json")).parent) for root in ("alone", "pair"))
    assert len(list((tmp_path / "pair").glob("*/*"))) == 1, "all ranks share one folder"
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    first, second = (json.loads(folder.summary.read_text())["val_last"]["val_loss"] for folder in (one, two))
    assert first == pytest.approx(second, rel=1e-4)
    shares = [json.loads(folder.micro_batch.read_text())["chosen"] for folder in (one, two)]
    assert shares == [4, 2] and two.preflight.is_file()


VARIANTS = (
    ("adapter.method=full",),
    ("optimizations=extreme", "adapter.rank=64"),
    ("optimizations=none", "data.unit=file"),
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_ways_to_train(trained: Trained, variant: tuple[str, ...]) -> None:
    folder = trained("debug=tiny", *variant)
    assert folder.finished and len(losses(folder)) == 3 and all(0 < loss < 12 for loss in losses(folder).values())


@pytest.mark.slow
def test_trackio_keeps_a_run(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    done = program("debug=tiny", "logger=trackio", "training.completion_tokens=0", environment={"TRACKIO_DIR": str(tmp_path / "trackio")})
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "trackio").glob("*.db")) and "trackio show" in done.stdout


def test_records_from_a_file(trained: Trained, repository: Path, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    files = sorted(repository.rglob("*.py"))
    lines = [json.dumps({"text": path.read_text(), "repo": "sample", "path": path.name}) for path in files]
    records.write_text("\n".join(lines))
    folder = trained("debug=tiny", "data=jsonl", f"data.path={records}", "training.completion_tokens=0")
    assert folder.finished and len(losses(folder)) == 3
    assert json.loads(folder.plan.read_text())["corpus"]["origin"] == str(records)


@pytest.mark.faults
def test_a_logger_that_does_not_start_stops_the_run(program: Program, tmp_path: Path) -> None:
    done = program("debug=tiny", "logger=wandb", "logger.project=a/b", "training.completion_tokens=0")
    assert done.returncode == 2 and "logger=wandb does not start" in done.stderr and "logger=none" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert "logger=wandb does not start" in (only_run(tmp_path).path / "error.txt").read_text()


def test_a_model_from_a_folder(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my-model"
    tiny("qwen2", "eager", vocab_size=300, max_position_embeddings=128).save_pretrained(folder)
    pretrained.byte_tokenizer().save_pretrained(folder)
    run = trained("model=phi2", f"model.path={folder}", "debug=tiny", "model.weights=pretrained", "name=null")
    assert run.path.name.endswith("my-model-tier1") and "YaRN factor 2 stretches 128" in capsys.readouterr().out
    # Weights as given, so a loss near that of a guess among its 300 tokens, and the adapter loads onto them with peft alone.
    assert losses(run)[1] == pytest.approx(math.log(300), abs=0.5)
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = base.lm_head.weight.detach().clone()
    merged = PeftModel.from_pretrained(base, run.final).merge_and_unload()
    assert torch.equal(merged.lm_head.weight, before)
    first = merged.model.layers[0].mlp.down_proj.weight
    assert not torch.equal(first, load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"])


def test_overfitting_works(trained: Trained) -> None:
    curve = losses(trained("debug=overfit"))
    assert curve[60] < 0.6 * curve[1]
