"""Whole runs of the program under the streamed executor: the same losses as under the whole one, checkpoints, resuming, completions."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from elite import modes, worker
from elite.callbacks import metrics_file
from elite.compose import from_overrides
from elite.config import RunConfig
from elite.runfolder import RunFolder
from elite.schema import from_yaml
from tests.conftest import Trained
from tests.distributed.forked import together

TINY = ("debug=tiny", "optimizations.mixed_precision.enabled=false", "training.learning_rate=1e-2", "model.num_hidden_layers=3")
# Neither divides the context of 256.
STREAMED = ("executor=streamed", "executor.chunk=48", "executor.block=100")
LAYOUTS = (
    ("executor.keep=attention",),
    ("executor.keep=layers", "executor.keys_values=host", "executor.weights=streamed"),
    ("executor.keep=multilevel", "executor.slots=1", "executor.boundaries=disk"),
    ("executor.keep=sqrt", "adapter.method=full", "schedule=constant", "training.learning_rate=1e-3"),
    ("executor.keep=attention", "executor.weights=streamed", "data.unit=file", "optimizations.fused_lora.enabled=false"),
)


def losses(folder: RunFolder) -> dict[int, float]:
    return {int(line["step"]): line["loss"] for line in metrics_file.read(folder.metrics) if "loss" in line}


def validations(folder: RunFolder) -> dict[str, float]:
    lines = [line for line in metrics_file.read(folder.metrics) if "val_loss" in line]
    return {f"{name} {int(line['step'])}": line[name] for line in lines for name in ("val_loss", "val_loss_alone")}


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def final(folder: RunFolder) -> dict[str, Tensor]:
    return {name: tensor for file in folder.final.glob("*.safetensors") for name, tensor in load_file(file).items()}


WHOLE: dict[tuple[str, ...], RunFolder] = {}
"""Runs of this process under the whole executor, to which an executor's layout is nothing."""


@pytest.mark.xdist_group("streamed runs")
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: ",".join(word.partition(".")[2] for word in layout))
def test_a_run_is_that_of_the_whole_executor(trained: Trained, layout: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> None:
    rest = tuple(word for word in layout if not word.startswith("executor."))
    if rest not in WHOLE:
        WHOLE[rest] = trained(*TINY, *rest, "executor=whole", f"output.root={tmp_path_factory.mktemp('whole')}")
    whole, streamed = WHOLE[rest], trained(*TINY, *layout, *STREAMED)
    plan = read(streamed.plan)
    assert plan["executor"] == "streamed" and read(whole.plan)["executor"] == "whole"
    assert (plan["layout"]["chunk"], plan["layout"]["block"]) == (48, 100)
    asked = {word.partition("=")[0].removeprefix("executor."): word.partition("=")[2] for word in layout if word.startswith("executor.")}
    assert {name: str(plan["layout"][name]) for name in asked} == asked
    # The first step cannot tell what the gradients were; the later ones can.
    assert len(losses(whole)) == 3 and abs(losses(whole)[1] - losses(whole)[3]) > 1e-3
    assert losses(streamed) == pytest.approx(losses(whole), abs=1e-4)
    assert len(validations(whole)) == 6 and validations(streamed) == pytest.approx(validations(whole), abs=1e-4)
    one, two = read(streamed.summary), read(whole.summary)
    assert one.keys() == two.keys() and (one["steps"], one["tokens"]) == (two["steps"], two["tokens"])
    assert one["val_last"] == pytest.approx(two["val_last"], abs=1e-4)
    assert not {"gradient_checkpointing", "flash_attention", "fused_loss"} & one["applied"].keys() and "flash_attention" in two["applied"]
    ours, theirs = final(streamed), final(whole)
    assert ours.keys() == theirs.keys() and ours
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=5e-5, msg=name)
    # Generation goes through the model's own forward, with streamed weights brought on demand.
    assert read(streamed.path / "completion.json") == read(whole.path / "completion.json")
    assert {"before", "after"} <= read(streamed.path / "completion.json").keys()


def test_a_run_leaves_checkpoints_of_what_it_trained(trained: Trained) -> None:
    folder = trained(*TINY, *STREAMED, "training.completion_tokens=0")
    assert folder.finished and "step_000003" in {path.name for path in folder.checkpoints.iterdir()}
    saved = load_file(folder.checkpoints / "step_000003" / "model" / "adapter_model.safetensors")
    assert saved and all(torch.equal(saved[name], tensor) for name, tensor in final(folder).items())
    assert any(tensor.abs().max() > 0 for name, tensor in saved.items() if "lora_B" in name)


@pytest.mark.parametrize("weights", [pytest.param("resident", marks=pytest.mark.faults), "streamed"])
def test_an_interrupted_run_continues_bit_for_bit(trained: Trained, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = (
        *TINY, *STREAMED, f"executor.weights={weights}", "executor.keep=layers", "training.max_steps=5", "training.val_every=4",
        "training.checkpoint_every=100", "training.completion_tokens=0", "data.order=shuffled", "adapter.dropout=0.1",
    )  # fmt: skip
    expected = trained(*request, "output.root=uninterrupted")
    written = metrics_file.MetricsFile.step

    def step(self: metrics_file.MetricsFile, record: dict[str, float]) -> None:
        written(self, record)
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(worker.Interrupted):
        patched.setattr(metrics_file.MetricsFile, "step", step)
        trained(*request)
    (identity,) = Path("runs").glob("*/*/run.json")
    halfway = RunFolder(identity.parent.absolute())
    assert sorted(losses(halfway)) == [1, 2, 3] and not halfway.finished and halfway.resumable
    done = trained(*request)
    assert done.path == halfway.path and done.finished
    assert losses(done) == losses(expected) and sorted(losses(done)) == [1, 2, 3, 4, 5]
    assert validations(done) == validations(expected)
    ours, theirs = final(done), final(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_choice_is_written_down(trained: Trained) -> None:
    """What the plan chose by itself is in the run folder, and reads back."""
    folder = trained(*TINY, "executor=streamed", "training.completion_tokens=0")
    config: RunConfig = from_yaml(folder.config)
    assert config.executor == from_overrides(*TINY, "executor=streamed").config.executor
    assert all(read(folder.plan)["layout"][name] is not None for name in ("chunk", "block", "keep", "boundaries", "keys_values", "weights"))


def test_two_ranks_train_like_one(trained: Trained, tmp_path: Path, repository: Path, cache: Path) -> None:
    request = [*TINY, *STREAMED, "executor.weights=streamed", "training.completion_tokens=0"]
    alone = trained(*request, "output.root=alone")
    where = f"data.repo={repository}", f"output.cache={cache}", "output.root=pair"
    pair, _ = modes._prepare(from_overrides(*request, *where, "hardware.gpus=2"))
    together(tmp_path / "ranks", 2, lambda ranks, _: worker.train(pair, ranks))
    assert read(pair.plan)["executor"] == "streamed" and (read(pair.plan)["ranks"], read(pair.plan)["accumulation"]) == (2, 1)
    assert losses(pair) == pytest.approx(losses(alone), abs=1e-4)
    assert validations(pair) == pytest.approx(validations(alone), abs=1e-4)
