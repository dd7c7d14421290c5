"""Parts of the training loop in runs as a user starts them."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from elite import checkpoint
from elite.callbacks import metrics_file
from elite.runfolder import RunFolder
from tests.conftest import Trained

TINY = ("debug=tiny", "training.completion_tokens=0", "schedule=constant")


def on(*parts: str) -> list[str]:
    return [f"optimizations.{part}.enabled=true" for part in parts]


def summary(folder: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(folder.summary.read_text())
    return found


@pytest.mark.parametrize("executor", ["whole", "streamed"])
def test_final_holds_the_average_and_the_summary_says_what_acted(
    trained: Trained, executor: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = ("ema", "lora_plus", "lookahead", "label_smoothing", "gradient_noise", "gradient_centralization", "kernel_warmup")
    options = ["optimizations.gradient_noise.eta=1e-10", "optimizations.lookahead.k=2", f"executor={executor}"]
    folder = trained(*TINY, *on(*parts), *options)
    found = summary(folder)
    assert set(found["applied"]) > set(parts)
    assert found["acted"]["ema"]["updates"] == 3 and found["acted"]["lookahead"]["returns"] == 2
    assert all(all(counts[name] for name in list(counts)[:1]) for counts in found["acted"].values())
    assert "moving average" in found["final_weights"] and found["ended_by"] == ""
    printed = capsys.readouterr().out
    assert "final/ holds the exponential moving average of the weights" in printed and "kernel_warmup" in printed
    last = checkpoint.require_latest(folder.checkpoints)
    averaged = checkpoint.load_state(last)["hooks"]["ema"]["averaged"]
    final, kept = (load_file(path / "adapter_model.safetensors") for path in (folder.final, last / "model"))
    of_average = sorted(tuple(value.shape) + (float(value.double().sum()),) for name, value in averaged.items() if name != "n_averaged")
    assert of_average == sorted(tuple(value.shape) + (float(value.double().sum()),) for value in final.values())
    assert any(not torch.equal(final[name], kept[name]) for name in kept)


def test_a_run_that_ends_early_says_so(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    # No improvement is as large as that.
    options = ["optimizations.early_stopping.patience=2", "optimizations.early_stopping.min_delta=100", "training.val_every=1"]
    folder = trained(*TINY, *on("early_stopping"), *options, "training.max_steps=6")
    found = summary(folder)
    assert folder.finished and found["steps"] == 2 and found["planned_steps"] == 6 and found["ended_by"] == "early_stopping"
    assert found["best_checkpoint"] and found["best_checkpoint"] in capsys.readouterr().out.replace("\n", "")
    assert [line["step"] for line in metrics_file.read(folder.metrics) if "loss" in line] == [1, 2]


def test_an_average_is_in_plan_preflight_and_checkpoint(trained: Trained) -> None:
    plans, found = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, parts in (("without", ()), ("with", ("ema", "lookahead"))):
        folder = trained(*TINY, *on(*parts), "training.preflight=true", f"output.root={name}")
        plans.append(json.loads(folder.plan.read_text()))
        found.append(json.loads(folder.preflight.read_text()))
        saved = checkpoint.require_latest(folder.checkpoints) / "state.safetensors"
        found[-1]["saved"] = saved.stat().st_size
    copies = 2 * 4 * plans[0]["trainable_params"]
    assert plans[1]["total_bytes"] - plans[0]["total_bytes"] == copies
    assert plans[1]["checkpoint_bytes"] - plans[0]["checkpoint_bytes"] == copies
    assert found[1]["measured_bytes"] - found[0]["measured_bytes"] == copies
    # Names and counters come on top.
    assert found[1]["saved"] - found[0]["saved"] == pytest.approx(copies, rel=0.2)
