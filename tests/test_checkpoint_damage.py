"""Whatever is done to a file of a checkpoint is noticed, and nothing in one is run or followed."""

import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from elite import checkpoint
from elite.checkpoint import manifest
from elite.errors import CheckpointError
from tests.training.rig import fitted, rig, weights

FILES = (
    "manifest.json",
    "model/README.md",
    "model/adapter_config.json",
    "model/adapter_model.safetensors",
    "state.json",
    "state.safetensors",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a real run: step 2 is its last, and an older one stands below it."""
    folder = tmp_path_factory.mktemp("run")
    fitted(rig(folder, steps=1))
    second = rig(folder, steps=2)
    second.resume(checkpoint.require_latest(second.checkpoints))
    fitted(second)
    older = folder / "checkpoints" / "step_000001"
    if not older.exists():
        # Pruned if step 2 is the best: what stands below is then written again.
        fitted(rig(folder / "again", steps=1))
        shutil.copytree(folder / "again" / "checkpoints" / "step_000001", older)
    return folder / "checkpoints"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "checkpoints"))


def test_these_are_all_files_of_a_checkpoint(run: Path) -> None:
    newest = run / "step_000002"
    assert {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()} == set(FILES)


def passed_over(folder: Path, victim: str, caplog: pytest.LogCaptureFixture) -> None:
    """The newest is found damaged, its file is named, the one below is used, and said to be."""
    caplog.clear()
    assert checkpoint.latest(folder) == folder / "step_000001"
    first, second = (record.getMessage() for record in caplog.records)
    assert "step_000002 is damaged" in first and victim in first
    assert second == "checkpoint step_000001 is intact and used instead"


@pytest.mark.parametrize("victim", FILES)
def test_a_flipped_bit_is_noticed_in_every_file(copy: Path, victim: str, caplog: pytest.LogCaptureFixture) -> None:
    path = copy / "step_000002" / victim
    content = path.read_bytes()
    places = {0, len(content) - 1, *random.Random(victim).sample(range(len(content)), 10)}
    for place in places:
        for bit in (0, 5, 7):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            passed_over(copy, victim, caplog)
    path.write_bytes(content)
    assert checkpoint.latest(copy) == copy / "step_000002"


@pytest.mark.parametrize("victim", FILES)
def test_a_cut_grown_or_missing_file_is_noticed(copy: Path, victim: str, caplog: pytest.LogCaptureFixture) -> None:
    path = copy / "step_000002" / victim
    content = path.read_bytes()
    for damaged in (b"", content[:-1], content[: len(content) // 2], content + b"\0", content + b"\n"):
        path.write_bytes(damaged)
        passed_over(copy, victim, caplog)
    path.unlink()
    passed_over(copy, victim, caplog)


def _flipped(path: Path, places: range, bits: Callable[[int], range]) -> None:
    content = (path / checkpoint.MANIFEST).read_bytes()
    for place in places[: len(content)]:
        for bit in bits(place):
            (path / checkpoint.MANIFEST).write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            assert checkpoint.fault(path), (place, bit)
    (path / checkpoint.MANIFEST).write_bytes(content)


def test_every_byte_of_the_manifest_counts(copy: Path) -> None:
    _flipped(copy / "step_000002", range(10_000), lambda place: range(place % 8, place % 8 + 1))


@pytest.mark.faults
def test_every_bit_of_the_manifest_counts(copy: Path) -> None:
    _flipped(copy / "step_000002", range(10_000), lambda place: range(8))


class Payload:
    """What is unpickled writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["model/adapter_model.bin", "model/pytorch_model.bin", "model/extra.safetensors", "state.pt"])
def test_a_planted_file_is_refused(copy: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    (copy / "step_000002" / name).write_bytes(pickle.dumps({}))
    passed_over(copy, f"{name} is not in manifest.json", caplog)


def test_a_pickle_is_not_read_even_where_the_manifest_has_it(copy: Path, tmp_path: Path) -> None:
    marker, newest = tmp_path / "unpickled", copy / "step_000002"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload works"
    marker.unlink()
    for name in ("model/adapter_model.bin", "model/pytorch_model.bin", "model/training_args.bin", "state.pt", "state.pkl"):
        (newest / name).write_bytes(pickle.dumps(Payload(marker)))
    (newest / checkpoint.MANIFEST).unlink()
    manifest.seal(newest, 2, None)
    trainer = rig(tmp_path, steps=2)
    before = weights(trainer)
    trainer.resume(checkpoint.require_latest(copy))
    assert trainer.progress.step == 2 and not all(torch.equal(one, two) for one, two in zip(before, weights(trainer)))
    assert not marker.exists()


def test_what_is_outside_is_not_read(copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest, secret = copy / "step_000002", tmp_path / "secret"
    secret.write_text("a")
    content = json.loads((newest / checkpoint.MANIFEST).read_text())
    del content["sha256"]
    for name in ("../../secret", str(secret)):
        named = content | {"files": {**content["files"], name: manifest._fingerprint(secret)}}
        (newest / checkpoint.MANIFEST).write_text(manifest._text(named | {"sha256": manifest._hash_of(named)}))
        passed_over(copy, f"manifest.json names {name}, which is outside", caplog)


def test_links_and_pipes_are_not_followed(copy: Path, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = copy / "step_000002"
    state = newest / "state.json"
    state.unlink()
    state.symlink_to(run / "step_000002" / "state.json")
    passed_over(copy, "state.json is neither file nor folder", caplog)
    state.unlink()
    os.mkfifo(state)
    passed_over(copy, "state.json is neither file nor folder", caplog)
    state.unlink()
    (newest / "elsewhere").symlink_to(run, target_is_directory=True)
    passed_over(copy, "elsewhere is neither file nor folder", caplog)


def test_a_checkpoint_under_another_name_is_refused(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(copy / "step_000001", copy / "step_000003")
    assert checkpoint.latest(copy) == copy / "step_000002"
    assert "step_000003 is damaged or incomplete (manifest.json is that of step 1)" in caplog.text


def test_a_later_format_is_refused_in_words(copy: Path) -> None:
    path = copy / "step_000002" / checkpoint.MANIFEST
    content = json.loads(path.read_text()) | {"format": 2}
    del content["sha256"]
    path.write_text(manifest._text(content | {"sha256": manifest._hash_of(content)}))
    with pytest.raises(CheckpointError, match="has format 2, this version reads up to 1"):
        checkpoint.latest(copy)


def test_checkpoints_from_before_formats_were_counted_are_read(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = copy / "step_000002" / checkpoint.MANIFEST
    files = json.loads(path.read_text())["files"]
    path.write_text(json.dumps(files, indent=1))
    assert checkpoint.latest(copy) == copy / "step_000002"
    (copy / "step_000002" / "state.json").write_text("{}")
    passed_over(copy, "state.json has 2 bytes", caplog)


def test_steps_are_numbers_not_words(copy: Path) -> None:
    for step in (999_999, 1_000_000):
        place = Path(shutil.copytree(copy / "step_000001", copy / f"step_{step}"))
        (place / checkpoint.MANIFEST).unlink()
        manifest.seal(place, step, None)
    assert checkpoint.latest(copy) == copy / "step_1000000"


def saved(folder: Path, step: int, value: float) -> Path:
    def save_model(place: Path) -> None:
        place.mkdir()
        (place / "weights").write_bytes(bytes(20_000))

    return checkpoint.write(folder, checkpoint.snapshot(step, save_model, {"x": torch.full((5000,), value)}))


def test_one_that_is_replaced_is_there_until_the_new_one_is(tmp_path: Path) -> None:
    path = saved(tmp_path, 3, 1.0)
    old = path.rename(tmp_path / "step_000003.old")
    assert checkpoint.latest(tmp_path) == old, "killed between two names"
    checkpoint.prune(tmp_path, {3})
    assert checkpoint.latest(tmp_path) == old, "it is the only one of that step"
    assert saved(tmp_path, 3, 2.0) == path == checkpoint.latest(tmp_path)
    assert checkpoint.load_state(path)["x"][0] == 2.0
    (path / "state.json").write_text("damaged")
    assert checkpoint.latest(tmp_path) == old
    saved(tmp_path, 3, 3.0)
    assert checkpoint.latest(tmp_path) == path
    checkpoint.prune(tmp_path, {3})
    assert [found.name for found in tmp_path.iterdir()] == ["step_000003"]


def _rewrites(folder: Path) -> None:
    for value in range(1_000_000):
        saved(folder, 3, float(value))
        checkpoint.prune(folder, {3})


def _killed_while_rewriting(folder: Path, times: int) -> None:
    saved(folder, 3, -1.0)
    moments = random.Random(0)
    for _ in range(times):
        process = multiprocessing.get_context("fork").Process(target=_rewrites, args=(folder,))
        process.start()
        time.sleep(moments.uniform(0.005, 0.06))
        assert process.pid is not None and process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = checkpoint.latest(folder)
        assert found is not None
        assert len(set(checkpoint.load_state(found)["x"].tolist())) == 1
    saved(folder, 3, 0.0)
    checkpoint.prune(folder, {3})
    assert [path.name for path in folder.iterdir()] == ["step_000003"], "what the killed ones left is cleared away"


def test_a_kill_while_one_step_is_saved_anew_leaves_a_valid_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    _killed_while_rewriting(tmp_path, 20)


@pytest.mark.faults
def test_many_kills_while_one_step_is_saved_anew_leave_a_valid_one(tmp_path: Path) -> None:
    _killed_while_rewriting(tmp_path, 300)
