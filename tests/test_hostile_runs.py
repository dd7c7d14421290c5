"""Run folders that somebody else made, or that are damaged: values alone come back, and what is wrong is said in words."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elite import compose, evaluation, modes, schema, worker
from elite.callbacks import metrics_file
from elite.config import RunConfig
from elite.distributed.ranks import joined
from elite.errors import EliteError
from elite.prepared import read_plan
from elite.runfolder import RunFolder, interrupted_run
from tests.conftest import Trained
from tests.test_runfolder import KEY, begun

CONFIG = compose.from_overrides("debug=tiny").config


def refused(action: Callable[[], object], *mentions: str) -> None:
    """It ends in an error of at most three lines, exit code 2, with these words and a remedy."""
    with pytest.raises(EliteError) as caught:
        action()
    message = str(caught.value)
    assert caught.value.exit_code == 2 and caught.value.remedy and len(message.splitlines()) <= 3
    for mention in mentions:
        assert mention in message, message


def written(folder: Path, extra: str = "", **replaced: str) -> Path:
    """The configuration of a run, with lines added or text replaced."""
    path = folder / "config.yaml"
    text = schema.to_yaml(CONFIG)
    for old, new in replaced.items():
        assert f"{old}: " in text
        text = "\n".join(f"{old}: {new}" if line.startswith(f"{old}: ") else line for line in text.splitlines())
    path.write_text(f"{text}\n{extra}")
    return path


HOSTILE = {
    "a target": ("_target_: os.system\ncommand: touch mark", "_target_ names something to be called"),
    "a target in extra fields": ("model:\n  extra:\n    _target_: os.system\n    _args_: [touch mark]", ""),
    "a target in rope": ("x: 1\nmodel:\n  rope_parameters: {_target_: os.system}", ""),
    "hydra's own section": ("hydra:\n  run:\n    dir: /tmp/elsewhere", "hydra"),
    "hydra's callbacks": ("hydra:\n  callbacks:\n    x:\n      _target_: os.system", "_target_"),
    "a python object": ("name2: !!python/object/apply:os.system ['touch mark']", "damaged"),
    "a python name": ("name2: !!python/name:os.system", "damaged"),
    "an unknown key": ("nonsense: 1", "nonsense"),
    "an anchor that grows": ("a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]", "aliases"),
    "no mapping": ("- 1", ""),
    "a tab": ("\tx: 1", "damaged"),
    "half a line": ("training: {", "damaged"),
}


@pytest.mark.parametrize(("extra", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_configuration_with_more_than_values(tmp_path: Path, extra: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: schema.from_yaml(written(tmp_path, extra)), "config.yaml", words)
    assert not (tmp_path / "mark").exists()


INTERPOLATIONS = ("${oc.env:SECRET}", "${oc.decode:${oc.env:SECRET}}", "${hydra:runtime.cwd}", "${now:%Y}", "${seed}", "a${tier.context}b")


@pytest.mark.parametrize("text", INTERPOLATIONS)
def test_an_interpolation_is_not_resolved(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    refused(lambda: schema.from_yaml(written(tmp_path, name=f'"{text}"')), "name=", "is an interpolation")


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", "many"), ("seed", "1.5"), ("seed", "[1]"), ("mode", "nonsense"), ("name", "{a: 1}"), ("seed", "null"), ("seed", "???")],
)
def test_values_of_the_wrong_type(tmp_path: Path, field: str, value: str) -> None:
    refused(lambda: schema.from_yaml(written(tmp_path, **{field: value})), "config.yaml")


def test_a_configuration_that_was_cut_off(tmp_path: Path) -> None:
    whole = schema.to_yaml(CONFIG).splitlines(keepends=True)
    for lines in range(0, len(whole), 25):
        (tmp_path / "config.yaml").write_text("".join(whole[:lines]))
        refused(lambda: schema.from_yaml(tmp_path / "config.yaml"), "config.yaml")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"\0", b"[" * 3000, b"x" * (2 << 20), b"null", b"7"])
def test_a_damaged_configuration(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    refused(lambda: schema.from_yaml(tmp_path / "config.yaml"), "config.yaml")


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    refused(lambda: schema.from_yaml(tmp_path / "config.yaml"), "cannot be read")
    (tmp_path / "config.yaml").mkdir()
    refused(lambda: schema.from_yaml(tmp_path / "config.yaml"), "cannot be read")


NOT_OBJECTS = (b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000, b'{"micro_batch": 1}x')


@pytest.mark.parametrize("content", NOT_OBJECTS, ids=lambda content: repr(content[:9]))
def test_damaged_json_of_a_run(tmp_path: Path, content: bytes) -> None:
    folder = begun(tmp_path, 1)
    for file, action in (
        (folder.identity, folder.read_identity),
        (folder.plan, lambda: read_plan(folder)),
        (folder.summary, folder.best_val_loss),
    ):
        file.write_bytes(content)
        refused(action, file.name)


@pytest.mark.parametrize(
    "fields", [{"micro_batch": "many"}, {"micro_batch": None}, {"steps": []}, {"executor": 7}, {"total_bytes": "x"}, {"fits": 1.5}]
)
def test_a_plan_of_the_wrong_types(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = begun(tmp_path, 1)
    folder.plan.write_text(json.dumps({"micro_batch": 1, **fields}))
    refused(lambda: read_plan(folder), "plan.json", next(iter(fields)))


def test_a_damaged_run_among_others_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = begun(tmp_path, 1), begun(tmp_path, 2)
    newer.identity.write_text('{"request": ')
    found = interrupted_run(tmp_path, KEY)
    assert found is not None and found.path == older.path
    assert "run.json" in caplog.text and "not continued" in caplog.text
    # Nothing of it is taken for a new run either.
    refused(
        lambda: modes.new_folder(replace(CONFIG, output=replace(CONFIG.output, folder=str(newer.path))), "a", modes.datetime.now()), "holds"
    )


def test_damaged_metrics_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    lines = [json.dumps(line).encode() for line in good]
    path.write_bytes(
        b"\n".join([lines[0], b"{}", b'{"step": "x"}', b"{\xff}", b"[1]", lines[1], b"[" * 100_000, lines[2], b'{"step": 4, "lo'])
    )
    assert metrics_file.read(path) == good
    assert "6 damaged line(s)" in caplog.text
    metrics_file.MetricsFile(path, resumed_step=2).end({})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


DAMAGED_WHERE = ("plan.json", "run.json", "config.yaml")


@pytest.mark.faults
def test_a_run_whose_files_are_damaged_ends_in_words(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way, as resuming and evaluating go it."""
    folder = trained("debug=tiny", "training.completion_tokens=0", "training.max_steps=1")
    folder.summary.unlink()
    for name in DAMAGED_WHERE:
        file = folder.path / name
        whole = file.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"\0" * 100):
            file.write_bytes(content)
            with joined() as ranks:
                refused(lambda ranks=ranks: worker.train(folder, ranks), name)  # type: ignore[misc]
                refused(lambda ranks=ranks: evaluation.evaluate(folder, CONFIG.evaluate, CONFIG.optimizations, ranks), name)  # type: ignore[misc]
        file.write_bytes(whole)
    assert not (Path.cwd() / "mark").exists()
    with joined() as ranks:
        worker.train(folder, ranks)
    assert folder.finished


def test_a_run_folder_of_pipes_does_not_hang(tmp_path: Path) -> None:
    for name in ("run.json", "plan.json", "summary.json"):
        os.mkfifo(tmp_path / name)
    folder = RunFolder(tmp_path)
    assert not folder.begun and not folder.finished and not folder.asked_for(KEY)


def test_the_configuration_still_survives(tmp_path: Path) -> None:
    made: RunConfig = compose.from_overrides("model=smollm2_135m", "data.exclude=[a/*,b]", "name=x", "tier=tier3").config
    (tmp_path / "config.yaml").write_text(schema.to_yaml(made))
    assert schema.from_yaml(tmp_path / "config.yaml") == made
