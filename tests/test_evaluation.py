"""A run evaluated: the losses that training saw, and completions with pages as without."""

import json
from pathlib import Path
from typing import Any

import pytest

from elite import compose, modes
from elite.errors import ConfigError
from elite.evaluation import next_line, scored
from elite.runfolder import RunFolder
from tests.conftest import Trained


def evaluated(folder: RunFolder, *overrides: str) -> dict[str, Any]:
    modes.run(compose.from_overrides("mode=evaluate", f"evaluate.run={folder.path}", "evaluate.files=2", "evaluate.tokens=12", *overrides))
    found: dict[str, Any] = json.loads(folder.evaluation.read_text())
    return found


def test_a_run_is_evaluated_as_it_was_trained(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    request = "debug=tiny", "tier.context=512", "data.val_fraction=0.4", "training.completion_tokens=0", "training.learning_rate=1e-2"
    folder = trained(*request)
    small = "optimizations.paged_attention.page=32"
    found = evaluated(folder, "evaluate.completions=3", small)
    last = json.loads(folder.summary.read_text())["val_last"]
    assert {name: found[name] for name in last} == pytest.approx(last, abs=1e-6), "the weights it ended with"
    buckets = found["by_position"]
    assert [(bucket["first"], bucket["end"]) for bucket in buckets] == [(0, 128), (128, 256), (256, 512)]
    assert all(0 < bucket["loss"] < 8 and bucket["tokens"] > 0 for bucket in buckets)
    files = found["completions"]["files"]
    assert len(files) == 2 and all(len(file["texts"]) == 3 and file["prompt_tokens"] == 500 for file in files)
    # 499 tokens are read before the prompt forks: 15 full pages of 32, and 512 in all need one more a continuation.
    assert all(file["pages"] == {"tokens": 32, "shared": 15, "own": 3} for file in files)
    shown = capsys.readouterr().out
    assert "context is worth" in shown and "36 pages of 32 tokens, 30 of them shared; 96 without" in shown
    paged, dense = (
        evaluated(folder, small, "evaluate.completions=1", f"optimizations.paged_attention.enabled={flag}") for flag in (True, False)
    )
    assert [file["texts"] for file in paged["completions"]["files"]] == [file["texts"] for file in dense["completions"]["files"]]
    assert dense["completions"]["files"][0]["pages"] is None and "paged_attention" in paged["completions"]["applied"]


def test_a_base_model_has_a_folder_of_its_own(tmp_path: Path, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    where = f"output.cache={cache}", f"data.repo={repository}", "output.folder=base"
    modes.run(compose.from_overrides("mode=evaluate", "debug=tiny", "evaluate.files=0", *where))
    found = json.loads((tmp_path / "base" / "evaluation.json").read_text())
    assert found["weights"] == "base" and found["completions"] is None and 5 < found["val_loss"] < 8
    assert not RunFolder(tmp_path / "base").begun, "nothing to continue"


def test_what_cannot_be_evaluated_says_why(tmp_path: Path) -> None:
    for override, words in ((f"evaluate.run={tmp_path}", "holds no run"), ("evaluate.completions=0", "must be positive")):
        with pytest.raises(ConfigError, match=words):
            modes.run(compose.from_overrides("mode=evaluate", override))


def test_the_next_line_by_hand() -> None:
    assert next_line("\n  \n    return x + 1\nprint()") == "return x + 1" and next_line(" \n") == ""
    assert scored("return x + 1  \nmore", "    return x + 1\n") == {"exact": 1.0, "similarity": 1.0}
    # "return y" of 8 and "return x + 1" of 12 characters share "return ".
    assert scored("return y", "return x + 1") == {"exact": 0.0, "similarity": 14 / 20}
