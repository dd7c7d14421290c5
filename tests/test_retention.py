"""Which checkpoints are on the disk after so many saves, against plain counting over all of them."""

import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elite import checkpoint, compose
from elite.errors import ConfigError
from elite.plan.values import check_values
from elite.retention import CheckpointConfig
from elite.training.saving import Saver
from tests.disks import Disk

LOSSES = st.one_of(st.none(), st.just(float("nan")), st.sampled_from([1.0, 2.0, 2.5]), st.floats(0, 10))
SAVES = st.lists(st.tuples(st.integers(1, 4), LOSSES), min_size=1, max_size=10)


def save(saver: Saver, folder: Path, step: int, loss: float | None) -> None:
    what = checkpoint.snapshot(step, lambda place: place.mkdir(), {"x": torch.ones(3)}, val_loss=loss)
    saver._write(what, asked=False)


def expected(history: dict[int, float | None], best: int, every: int) -> set[str]:
    """Over everything that was ever saved, one by one."""
    stays = set()
    for step, loss in history.items():
        better = 0
        for other, theirs in history.items():
            if theirs is not None and loss is not None and (theirs < loss or (theirs == loss and other < step)):
                better += 1
        known = loss is not None and loss == loss
        if step == max(history) or (known and better < best) or (every and step % every == 0):
            stays.add(f"step_{step:06d}")
    return stays


@settings(max_examples=20, deadline=None)
@given(saves=SAVES, best=st.integers(0, 3), every=st.integers(0, 5))
def test_what_stays_is_the_last_the_best_and_the_milestones(saves: list[tuple[int, float | None]], best: int, every: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, step, history = Path(place), 0, dict[int, float | None]()
        for gap, loss in saves:
            step += gap
            history[step] = loss
            # Each time anew: a run that continues knows what its checkpoints say, and nothing else.
            save(Saver(folder, CheckpointConfig(best, every)), folder, step, loss)
            assert {path.name for path in folder.iterdir()} == expected(history, best, every)
        assert checkpoint.latest(folder) == folder / f"step_{step:06d}"


def test_what_lies_ahead_of_a_run_that_went_back_is_of_no_use(tmp_path: Path) -> None:
    saver = Saver(tmp_path, CheckpointConfig(keep_best=2))
    for step, loss in ((10, 3.0), (20, 2.0), (30, 1.0), (15, 2.5)):
        save(saver, tmp_path, step, loss)
    assert {path.name for path in tmp_path.iterdir()} == {"step_000015"}


def test_one_that_cannot_be_deleted_is_said_and_goes_at_the_next_save(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(keep_best=0))
    save(saver, tmp_path, 1, None)
    busy = disk("size=64k", tmp_path / "checkpoints" / "step_000001" / "model")
    save(saver, tmp_path, 2, None)
    assert "cannot be deleted" in caplog.text and "tried again at the next save" in caplog.text
    assert checkpoint.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_000002"
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["step_000002"], "half a checkpoint is none"
    moved = next(path for path in (tmp_path / "checkpoints").glob(".deleted-*/model"))
    assert busy.name == moved.name and moved.is_mount()
    subprocess.run(["umount", moved], check=True)
    save(saver, tmp_path, 3, None)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_000003"}


@pytest.mark.parametrize("field", ["keep_best", "milestone_every"])
def test_fewer_than_none_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"checkpoint.{field}=-1: must not be negative"):
        check_values(compose.from_overrides("debug=tiny", f"checkpoint.{field}=-1").config)
