"""Bad input through the program itself: at most three lines, exit code 2, no traceback, nothing half-written."""

import time
from pathlib import Path

import pytest

from elite import compose, modes
from elite.errors import EliteError
from tests.conftest import Program, git, make_repository


def refused(program: Program, tmp_path: Path, *overrides: str) -> str:
    """Run with bad input; returns what was said."""
    done = program(*overrides)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr + done.stdout
    message = done.stderr[done.stderr.index("error:") :]
    assert len(message.strip().splitlines()) <= 3, message
    assert done.stderr.count("error:") == 1
    assert not (tmp_path / "runs").exists()
    return message


def test_an_unknown_tier(program: Program, tmp_path: Path) -> None:
    assert "did you mean tier9" in refused(program, tmp_path, "tier=tier99")


def test_a_preset_that_is_not_here(program: Program, tmp_path: Path) -> None:
    message = refused(program, tmp_path, "hardware=rtx3090", "model=smollm2_135m", "model.weights=random")
    assert "mode=plan" in message and "hardware=auto" in message


def test_no_model_and_no_hub(program: Program, tmp_path: Path) -> None:
    began = time.monotonic()
    message = refused(program, tmp_path, "model=phi2", "tier=tier1")
    assert "microsoft/phi-2" in message and "model.path=" in message
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.learning_rate=-1"], ["learning_rate"]),
        (["training.learning_rate=nan"], ["learning_rate=nan"]),
        (["training.max_grad_norm=inf"], ["max_grad_norm=inf"]),
        (["seed=-1"], ["seed=-1"]),
        (["stability.max_skips=-1"], ["stability.max_skips=-1", "must not be negative"]),
        (["stability.max_rewinds=0"], ["stability.max_rewinds=0", "must be positive"]),
        (["watchdog.minutes=-1"], ["watchdog.minutes=-1"]),
        (["schedule.warmup_fraction=2"], ["warmup_fraction=2"]),
        (["schedule=wsd", "schedule.warmup_fraction=0.9"], ["warmup_fraction=0.9", "exceed"]),
        (["data.val_fraction=5"], ["val_fraction=5"]),
        (["data.val_sequences=0"], ["val_sequences=0"]),
        (["tier.target_length=1"], ["target_length=1"]),
        (["model.vocab_size=100"], ["257", "vocab_size"]),
        (["model.rope_parameters={rope_type: nonsense}"], ["rope_type=nonsense", "yarn"]),
        (["name=../../elsewhere"], ["name='../../elsewhere'"]),
        (["tier.context=100"], ["tier.context=100"]),
        (["training.global_batch_tokens=1000"], ["global_batch_tokens=1000"]),
        (["data.repo=/does/not/exist"], ["/does/not/exist"]),
        (["data.source=csv"], ["data.source=csv", "jsonl"]),
        (["output.root=/proc/none"], ["/proc/none", "output.root"]),
        (["model.path=/does/not/exist", "model.weights=pretrained"], ["/does/not/exist"]),
        (["model.num_attention_heads=5"], ["num_attention_heads"]),
        (["resume=/does/not/exist"], ["resume=/does/not/exist"]),
        (["tier.context=1048576", "training.global_batch_tokens=1048576"], ["tokens"]),
    ],
)
def test_bad_values(
    overrides: list[str], words: list[str], repository: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    defaults = [] if any(word.startswith("data.repo") for word in overrides) else [f"data.repo={repository}"]
    with pytest.raises(EliteError) as caught:
        modes.run(compose.from_overrides("debug=tiny", f"output.cache={cache}", *defaults, *overrides))
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) <= 3
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_repositories_that_cannot_be_used(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init")
    make_repository(tmp_path / "short", files=2, lines=1)
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "empty", "short"):
        with pytest.raises(EliteError) as caught:
            modes.run(compose.from_overrides("debug=tiny", f"output.cache={cache}", f"data.repo={tmp_path / name}", "training.max_steps=1"))
        assert name in str(caught.value) or "tokens" in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 3


def test_a_plan_needs_no_gpu_and_no_network(program: Program) -> None:
    done = program("tier=tier9", "hardware=rtx3090", "mode=plan")
    assert done.returncode == 0, done.stderr
    for word in ("phi2", "1,048,576", "rtx3090", "estimated", "FITS", "streamed: chunks of", "qlora", "YaRN"):
        assert word in done.stdout, word


def test_a_survey_needs_no_gpu_no_network_and_no_corpus(program: Program) -> None:
    done = program("mode=tiers", "hardware=rtx2060s", "data.repo=/does/not/exist")
    assert done.returncode == 0, done.stderr
    assert all(f"tier{n} " in done.stdout for n in range(1, 12)) and "rtx2060s" in done.stdout
    done = program("mode=max_context", "hardware=rtx2060s", "data.repo=/does/not/exist")
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("Longest context of phi2", "whole", "streamed"))


def test_without_a_repository_it_says_so(tmp_path: Path, program: Program) -> None:
    done = program("mode=plan", "tier=tier1", "data.repo=null", environment={"HOME": str(tmp_path)})
    assert done.returncode == 2 and "data.repo=" in done.stderr
