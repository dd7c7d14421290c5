"""Curricula in whole runs: stopped and continued across a border, under both executors, and by difficulty."""

import json
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from elite import worker
from elite.callbacks import metrics_file
from elite.data.tokens import open_store
from elite.distributed.ranks import Ranks
from elite.executor.whole import WholeExecutor
from elite.runfolder import RunFolder
from elite.training.curriculum import file_losses
from tests.conftest import Trained
from tests.executor.test_run_streamed import STREAMED, TINY, final, losses, read, validations
from tests.models import tiny

GROWING = (
    *TINY, "curriculum=context", "curriculum.until=[0.34,0.67]", "training.max_steps=6", "training.val_every=3",
    "training.checkpoint_every=100", "training.completion_tokens=0", "data.order=shuffled", "adapter.dropout=0.1",
)  # fmt: skip
EXECUTORS = {"whole": ("executor=whole",), "streamed": (*STREAMED, "executor.keep=layers")}


def stopped_at(trained: Trained, step: int, *request: str) -> RunFolder:
    """The run, interrupted while it took this step."""
    written = metrics_file.MetricsFile.step

    def at_step(self: metrics_file.MetricsFile, record: dict[str, float]) -> None:
        written(self, record)
        if record["step"] == step:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(worker.Interrupted):
        patched.setattr(metrics_file.MetricsFile, "step", at_step)
        trained(*request)
    (identity,) = (path for path in Path("runs").glob("*/*/run.json") if not RunFolder(path.parent).finished)
    return RunFolder(identity.parent.absolute())


@pytest.mark.parametrize(
    ("executor", "stops"),
    [("whole", (2,)), pytest.param("whole", (1, 3), marks=pytest.mark.faults), pytest.param("streamed", (2,), marks=pytest.mark.faults)],
)
def test_a_growing_context_continues_bit_for_bit_across_borders(trained: Trained, executor: str, stops: tuple[int, ...]) -> None:
    request = (*GROWING, *EXECUTORS[executor])
    expected = trained(*request, "output.root=uninterrupted")
    contexts = [line["context"] for line in metrics_file.read(expected.metrics) if "loss" in line]
    assert contexts == [64, 64, 128, 128, 256, 256]
    assert {line["tokens"] for line in metrics_file.read(expected.metrics) if "loss" in line} == {512 * step for step in range(1, 7)}
    assert [(s["context"], s["micro_batch"], s["first_step"]) for s in read(expected.plan)["stages"]] == [
        (64, 4, 0),
        (128, 2, 2),
        (256, 1, 4),
    ]
    for stop in stops:
        halfway = stopped_at(trained, stop, *request)
        done = trained(*request)
        assert done.path == halfway.path and done.finished, stop
        assert losses(done) == losses(expected) and validations(done) == validations(expected)
        ours, theirs = final(done), final(expected)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_both_executors_agree_on_a_growing_context(trained: Trained) -> None:
    request = (*GROWING, "adapter.dropout=0")
    whole, streamed = (trained(*request, *EXECUTORS[name], f"output.root={name}") for name in ("whole", "streamed"))
    assert losses(streamed) == pytest.approx(losses(whole), abs=1e-4)
    assert validations(streamed) == pytest.approx(validations(whole), abs=1e-4)


def test_validation_has_the_whole_context_throughout(trained: Trained) -> None:
    """Before the first step nothing has been trained: the losses are those of a run without a curriculum."""
    growing, plain = trained(*GROWING, "executor=whole"), trained(*GROWING, "executor=whole", "curriculum=none")
    first = [{name: value for name, value in validations(folder).items() if name.endswith(" 0")} for folder in (growing, plain)]
    assert first[0] == first[1] and len(first[0]) == 2
    assert losses(growing)[1] != losses(plain)[1] and json.loads(growing.summary.read_text())["steps"] == 6


def test_file_losses_are_the_models(trained: Trained, tmp_path: Path) -> None:
    folder = trained(*TINY, "training.max_steps=1", "training.completion_tokens=0")
    store = open_store(Path(folder.read_identity()["tokens"]))
    assert store is not None
    model = tiny("llama", vocab_size=512)
    files, executor = store.select("train"), WholeExecutor(model, torch.float32)
    found = file_losses(store, files, 128, executor, Ranks(0, 1, torch.device("cpu")))
    assert len(found) == len(files) > 4 and model.training
    plain = tiny("llama", "eager", vocab_size=512).eval()
    for file, loss in zip(files, found, strict=True):
        tokens = torch.from_numpy(store.tokens[file.start : file.start + min(128, file.length)].astype("int64"))
        with torch.no_grad():
            logits = plain(tokens[None]).logits[0]
        assert loss == pytest.approx(F.cross_entropy(logits[:-1], tokens[1:]).item(), abs=1e-4)


@pytest.mark.parametrize("measure", [pytest.param("length", marks=pytest.mark.faults), "loss"])
def test_easy_first_continues_bit_for_bit(trained: Trained, measure: str, capsys: pytest.CaptureFixture[str]) -> None:
    request = (
        *TINY, "curriculum=difficulty", f"curriculum.measure={measure}", "data.unit=file", "training.max_steps=5", "training.val_every=100",
        "training.checkpoint_every=100", "training.completion_tokens=0", "executor=whole",
    )  # fmt: skip
    expected = trained(*request, "output.root=uninterrupted")
    plain = trained(*request, "output.root=plain", "curriculum=none")
    assert losses(expected) != losses(plain)
    assert capsys.readouterr().out.count("files scored") == (1 if measure == "loss" else 0)
    halfway = stopped_at(trained, 2, *request)
    done = trained(*request)
    assert done.path == halfway.path and losses(done) == losses(expected)
    assert capsys.readouterr().out.count("files scored") == (1 if measure == "loss" else 0), "scored once"
    assert done.difficulty.is_file() == (measure == "loss")
    assert f"difficulty by {measure}" in read(done.plan)["curriculum"]
