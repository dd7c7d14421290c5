"""Killed at any moment and continued, a run ends as the undisturbed one: bit for bit, in everything that a checkpoint holds.

Nothing loads data in other processes: tokens are mapped from the disk and a batch is a slice of them, so that there are no loader workers
whose number could matter.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from elite import checkpoint
from elite.callbacks import metrics_file
from elite.data.batches import Batch
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.whole import WholeExecutor
from elite.runfolder import RunFolder
from tests.conftest import Trained, make_repository
from tests.test_checkpoint import equal

SAID = ("step", "tokens", "loss", "grad_norm", "lr", "context", "val_loss", "val_loss_alone", "skipped_steps", "spikes", "rewinds")
"""Of a line of metrics, what no clock and no memory says."""
STEPS = 10
REQUEST = (
    "debug=tiny", f"training.max_steps={STEPS}", "training.val_every=4", "training.checkpoint_every=3", "training.completion_tokens=0",
    "optimizations.mixed_precision.enabled=false", "training.learning_rate=1e-2", "data.order=shuffled",
)  # fmt: skip
STREAMED = ("executor=streamed", "executor.chunk=48", "executor.block=100")


def on(*parts: str) -> list[str]:
    return [f"optimizations.{part}.enabled=true" for part in parts]


SPIKES = (*on("loss_spike_detection"), "optimizations.loss_spike_detection.minimum=3", "optimizations.loss_spike_detection.threshold=2")
MODES: dict[str, tuple[str, ...]] = {
    "lora": ("adapter.dropout=0.1", *on("ema", "gradient_noise"), "optimizations.gradient_noise.eta=1e-8"),
    "full": ("adapter.method=full", "training.learning_rate=1e-3", *on("swa"), "optimizations.swa.start=0.3", *SPIKES),
    "qlora": (*on("qlora", "adamw_8bit", "lookahead"), "adapter.rank=64", "adapter.dropout=0.1", "optimizations.lookahead.k=4"),
    "streamed": (*STREAMED, "executor.keep=layers", "executor.weights=streamed", "adapter.dropout=0.1", *on("ema")),
    "streamed-full": (*STREAMED, "executor.keep=sqrt", "adapter.method=full", "training.learning_rate=1e-3"),
    "growing": ("curriculum=context", "curriculum.until=[0.34,0.67]", "adapter.dropout=0.1"),
    "difficulty": ("curriculum=difficulty", "curriculum.measure=loss", "data.unit=file", "adapter.dropout=0.1"),
}
OFTEN = [pytest.param(mode, marks=[] if mode == "lora" else pytest.mark.faults) for mode in MODES]


@dataclass(frozen=True)
class Moment:
    """When a process is killed."""

    where: str
    step: int

    def arrange(self, patch: pytest.MonkeyPatch) -> None:
        """Have this process kill itself then."""
        told, seen = metrics_file.MetricsFile.step, {"step": -1, "passes": 0}

        def step(file: metrics_file.MetricsFile, record: dict[str, float]) -> None:
            told(file, record)
            seen["step"], seen["passes"] = int(record["step"]), 0
            if self.where == "between" and record["step"] == self.step:
                # Kills while a checkpoint is being written come by themselves in tests/test_many_kills.py; here one is to go on from.
                while not any(Path("runs").glob("*/*/checkpoints/step_*")):
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)

        def loss_sum(of: Any) -> Callable[..., Tensor]:
            computed = of.loss_sum

            def counted(executor: Any, batch: Batch, keep: Tensor | None = None) -> Tensor:
                training = executor.model.training
                at_work = seen["step"] == (self.step - 1 if training else self.step)
                if at_work and training == (self.where == "accumulating"):
                    seen["passes"] += 1
                    if seen["passes"] == 2:
                        os.kill(os.getpid(), signal.SIGKILL)
                return computed(executor, batch, keep)

            return counted

        patch.setattr(metrics_file.MetricsFile, "step", step)
        for executor in (WholeExecutor, StreamedExecutor):
            patch.setattr(executor, "loss_sum", loss_sum(executor))


MOMENTS = (Moment("between", 4), Moment("accumulating", 6), Moment("validating", 8), Moment("between", 8), Moment("accumulating", 10))


def killed(run: Callable[[], object], moment: Moment) -> None:
    """Run in a process of its own that is killed then. A fork, for a new process would import everything again."""
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            moment.arrange(patch)
            try:
                run()
            finally:
                os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{moment} never came"


def told(folder: RunFolder) -> list[dict[str, float]]:
    return [{name: line[name] for name in SAID if name in line} for line in metrics_file.read(folder.metrics)]


def assert_same(done: RunFolder, expected: RunFolder) -> None:
    """Results, metrics, and everything in the last checkpoint."""
    assert told(done) == told(expected)
    for name in ("final", "model"):
        one, two = (tensors(folder, name) for folder in (done, expected))
        assert one.keys() == two.keys() and one and all(torch.equal(one[key], two[key]) for key in one), name
    one_state, two_state = (checkpoint.load_state(checkpoint.require_latest(folder.checkpoints)) for folder in (done, expected))
    assert one_state.keys() == two_state.keys()
    for part, value in one_state.items():
        assert equal(value, two_state[part]), part


def tensors(folder: RunFolder, name: str) -> dict[str, Tensor]:
    place = folder.final if name == "final" else checkpoint.require_latest(folder.checkpoints) / name
    return {key: tensor for file in sorted(place.glob("*.safetensors")) for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("mode", OFTEN)
def test_a_run_killed_again_and_again_is_the_undisturbed_one(mode: str, trained: Trained, tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "few", files=8, lines=11)
    request = (*REQUEST, f"data.repo={repository}", *MODES[mode])
    expected = trained(*request, "output.root=undisturbed")
    for moment in MOMENTS:
        killed(lambda: trained(*request), moment)
        (identity,) = Path("runs").glob("*/*/run.json")
        folder = RunFolder(identity.parent.absolute())
        assert not folder.finished and folder.begun, moment
    done = trained(*request)
    assert done.path == folder.path and done.finished
    assert [line["step"] for line in told(done) if "val_loss" in line] == [0, 4, 8, 10]
    assert [line["step"] for line in told(done) if "loss" in line] == list(range(1, STEPS + 1))
    assert_same(done, expected)
    epoch = checkpoint.load_state(checkpoint.require_latest(done.checkpoints))["stream"]["epoch"]
    assert epoch >= 1 or mode == "growing", "later epochs have an order of their own"
