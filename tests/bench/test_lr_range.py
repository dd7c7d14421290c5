"""`mode=lr_range` on a tiny model: what it leaves, and that a run afterwards is as if it had not been."""

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from elite import compose, modes
from elite.config import RunConfig
from elite.errors import EliteError
from elite.runfolder import RunFolder
from tests.conftest import Trained
from tests.executor.test_run_streamed import TINY, losses

REQUEST = (*TINY, "training.completion_tokens=0", "executor=whole")
RANGE = ("mode=lr_range", "lr_range.steps=12", "lr_range.lowest=1e-4", "lr_range.highest=0.3", "lr_range.smoothing=0.5")


@pytest.fixture
def tested(tmp_path: Path, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def call(*overrides: str) -> tuple[RunConfig, Path]:
        composed = compose.from_overrides(f"output.cache={cache}", f"data.repo={repository}", *REQUEST, *RANGE, *overrides)
        modes.run(composed)
        (file,) = tmp_path.rglob("lr_range.json")
        return composed.config, file

    return call


def test_it_suggests_a_rate_and_draws_it(tested: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config, file = tested()
    found = json.loads(file.read_text())
    assert len(found["rates"]) == 11 and found["rates"][0] == pytest.approx(1e-4) and found["step_tokens"] == 512
    # Before anything is learnt the loss is a guess among 512 tokens, and batches are alike once corrected.
    assert found["losses"][0] == pytest.approx(math.log(512), abs=0.3)
    assert min(found["smoothed"]) < found["smoothed"][0] - 0.05
    assert config.lr_range.lowest < found["suggested_learning_rate"] == found["valley"] < config.lr_range.highest
    assert f"training.learning_rate={found['valley']:.2g}" in capsys.readouterr().out
    ElementTree.parse(file.with_suffix(".svg"))


def test_a_run_afterwards_is_as_before(tested: Any, trained: Trained, tmp_path: Path) -> None:
    before = trained(*REQUEST, "output.root=before")
    _, file = tested("output.folder=here")
    assert file.parent == tmp_path / "here" / "lr_range"
    assert not RunFolder(file.parent).identity.exists() and not list(file.parent.glob("checkpoints/*"))
    # The same folder is free for a run, which finds nothing to continue.
    after = trained(*REQUEST, "output.folder=here")
    assert after.path == tmp_path / "here" and losses(after) == losses(before) and len(losses(after)) == 3


def test_a_smaller_step_and_the_scaled_rate(tested: Any) -> None:
    _, file = tested("lr_range.accumulation=1", "training.lr_scaling=sqrt", "training.lr_reference_tokens=2048", "lr_range.steps=6")
    found = json.loads(file.read_text())
    assert found["step_tokens"] == 256
    # 512 tokens a step, so a run's rate is half of what is typed.
    assert found["suggested_learning_rate"] == pytest.approx(2 * found["valley"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr_range.lowest=1", "lr_range.lowest=1"),
        ("lr_range.steps=2", "lr_range.steps=2"),
        ("lr_range.divergence=1", "lr_range.divergence=1"),
        ("hardware.gpus=2", "hardware.gpus=1"),
    ],
)
def test_what_cannot_be_tested_is_refused(tested: Any, override: str, words: str) -> None:
    with pytest.raises(EliteError) as caught:
        tested(override)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3
