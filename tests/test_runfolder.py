"""Which run a command continues."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from elite import compose
from elite.config import OutputConfig
from elite.errors import CheckpointError, ConfigError
from elite.facts import Device
from elite.runfolder import RunFolder, interrupted_run, new_folder, request_key, write_start

DEVICE = Device("cpu", "cpu", True, 1, 1, 1, None, False, 1.0, 1.0, 1.0, 1, 1)
CONFIG = compose.from_overrides("debug=tiny").config
KEY = request_key(CONFIG, "/repo")


def begun(root: Path, hour: int, key: str = KEY) -> RunFolder:
    """A folder with a run that has saved a step and not ended."""
    folder = new_folder(replace(CONFIG, output=OutputConfig(root=str(root))), "a", datetime(2026, 1, 1, hour))
    write_start(folder, CONFIG, {}, DEVICE, key, root)
    (folder.checkpoints / "step_000001").mkdir(parents=True)
    return folder


def test_the_newest_interrupted_run_of_the_same_request_is_continued(tmp_path: Path) -> None:
    assert interrupted_run(tmp_path, KEY) is None
    older, newer, other = begun(tmp_path, 1), begun(tmp_path, 2), begun(tmp_path, 3, "another request")
    found = interrupted_run(tmp_path, KEY)
    assert found is not None and found.path == newer.path != other.path
    newer.summary.write_text("{}")
    found = interrupted_run(tmp_path, KEY)
    assert found is not None and found.path == older.path


def test_a_run_that_saved_nothing_makes_room(tmp_path: Path) -> None:
    folder = begun(tmp_path, 1)
    assert folder.asked_for(KEY) and not folder.asked_for("another request")
    (folder.checkpoints / "step_000001").rmdir()
    folder.metrics.write_text("{}")
    with folder.held(), pytest.raises(CheckpointError, match="another process"):
        folder.begin_again()
    folder.begin_again()
    assert not folder.asked_for(KEY) and not folder.metrics.exists()
    again = new_folder(replace(CONFIG, output=OutputConfig(folder=str(folder.path))), "a", datetime(2026, 1, 1, 1))
    assert again.path == folder.path


def test_a_run_that_goes_on_is_not_interrupted(tmp_path: Path) -> None:
    folder = begun(tmp_path, 1)
    with folder.held():
        assert interrupted_run(tmp_path, KEY) is None
        with pytest.raises(CheckpointError, match="another process"), folder.held():
            pass
    assert interrupted_run(tmp_path, KEY) is not None


def test_the_request_is_what_is_trained_not_where_it_is_written() -> None:
    def key(*overrides: str, origin: str = "/repo") -> str:
        return request_key(compose.from_overrides("debug=tiny", *overrides).config, origin)

    assert key() == key("output.root=elsewhere") == key("resume=never") == key("mode=plan") == KEY
    assert len({key(), key("seed=1"), key("training.learning_rate=1e-4"), key("tier.context=512"), key(origin="/other")}) == 5


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path) -> None:
    assert begun(tmp_path, 1).path.name == "01-00-00_a"
    assert begun(tmp_path, 1).path.name == "01-00-00_a_2"
    assert begun(tmp_path, 1).path.name == "01-00-00_a_3"


def test_a_folder_is_not_written_over(tmp_path: Path) -> None:
    folder = begun(tmp_path, 1)
    config = replace(CONFIG, output=OutputConfig(folder=str(folder.path)))
    with pytest.raises(ConfigError, match="already holds a run"):
        new_folder(config, "a", datetime.now())
