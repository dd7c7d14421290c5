"""A run that goes on under another command: what it says, what is taken over, what is refused."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from elite import compose, modes, worker
from elite.config import Logger, RunConfig
from elite.continued import among, as_begun, changes, flat, refusal, typed, with_values
from elite.distributed.ranks import joined
from elite.errors import CheckpointError
from elite.runfolder import RunFolder, request_key
from elite.schema import from_yaml
from elite.stability import NonFinite
from tests.conftest import Trained
from tests.training.test_curriculum import stopped_at

BEGUN = ("debug=tiny", "training.max_steps=4", "training.completion_tokens=0", "training.checkpoint_every=100", "training.val_every=2")


@lru_cache
def config(*overrides: str) -> RunConfig:
    return compose.from_overrides(*overrides).config


def changed(*overrides: str) -> tuple[dict[str, object], list[str]]:
    return changes(config(*BEGUN), config(*overrides), typed(config(*overrides), config(), overrides))


def test_a_command_changes_what_it_says_and_no_more() -> None:
    assert changed() == ({}, []), "an empty command says nothing, whatever it composes"
    assert changed(*BEGUN) == ({}, [])
    assert changed("training.val_every=1", "logger=trackio", "stability.non_finite=stop") == (
        {"training.val_every": 1, "logger.name": Logger.trackio, "stability.non_finite": NonFinite.stop},
        [],
    )
    assert changed("training.val_every=50", "logger=wandb")[0] == {"training.val_every": 50, "logger.name": Logger.wandb}, (
        "defaults, if typed"
    )
    assert changed("tier=auto", "mode=train", "output.folder=elsewhere", "plan.min_sequences=1") == ({}, [])
    taken, refused = changed("tier=tier5", "training.checkpoint_every=7")
    assert taken == {"training.checkpoint_every": 7}
    assert refused[:2] == ["tier.name=tier5 (not tier1)", "tier.context=65536 (not 256)"]
    _, refused = changed("training.max_steps=null", "seed=0", "optimizations.ema.enabled=true")
    assert refused == ["optimizations.ema.enabled=true (not false)", "training.max_steps=null (not 4)"]


def test_a_refusal_is_short() -> None:
    _, refused = changed("model=phi2", "tier=tier3")
    assert len(refused) > 8 and refusal(refused).endswith(f"and {len(refused) - 4} more")


def test_a_field_is_replaced_where_it_stands() -> None:
    begun = config(*BEGUN)
    assert with_values(begun, {}) == begun
    made = with_values(begun, {"training.val_every": 9, "logger.project": "x", "name": "n", "optimizations.ema.enabled": True})
    known = flat(begun) | {"training.val_every": 9, "logger.project": "x", "name": "n", "optimizations.ema.enabled": True}
    assert flat(made) == known
    assert among("logger.name", ("logger.",)) and not among("loggers", ("logger.",)) and not among("seed", ("seeds", "see"))


def test_the_same_run_is_found_whatever_may_change() -> None:
    key = request_key(config(*BEGUN), "/repo")
    assert key == request_key(config(*BEGUN, "logger=wandb", "training.val_every=7", "stability.max_skips=3"), "/repo")
    assert key != request_key(config(*BEGUN, "training.max_grad_norm=7"), "/repo")
    assert as_begun(replace(config(*BEGUN), training=replace(config(*BEGUN).training, preflight=False))) == as_begun(config(*BEGUN))


def goes_on(*overrides: str) -> RunFolder:
    folder, _ = modes._prepare(compose.from_overrides(*overrides))
    with joined() as ranks:
        worker.train(folder, ranks)
    return folder


def test_a_run_goes_on_with_what_is_taken_over(trained: Trained, repository: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = stopped_at(trained, 1, *BEGUN)
    before, plan = begun.config.read_text(), begun.plan.read_text()
    where = (f"resume={begun.path}", f"data.repo={repository}")
    for words, said in (
        (("training.max_steps=9",), "refused: training.max_steps=9 (not 4)"),
        (("hardware.gpus=3",), "begun on 1 ranks, here are 3: a step's"),
        (("hardware=cpu",), "refused: hardware.name=cpu (not auto)"),
        (("adapter.rank=8", "logger=wandb"), "refused: adapter.rank=8 (not 4)"),
    ):
        with pytest.raises(CheckpointError) as caught:
            modes._prepare(compose.from_overrides(*where, *words))
        assert said in str(caught.value) and len(str(caught.value).splitlines()) == 2
    assert begun.config.read_text() == before, "nothing of a refused command is taken over"
    done = goes_on(*where, f"output.cache={cache}", "training.val_every=3", "stability.max_skips=2", "logger=none")
    assert done.path == begun.path and done.finished and done.plan.read_text() == plan
    assert "from here on: training.val_every=3, stability.max_skips=2" in capsys.readouterr().out.replace("\n", " ")
    lines = [line for line in done.metrics.read_text().splitlines() if "val_loss" in line]
    assert [f'"step": {step},' in line for step, line in zip((0, 3, 4), lines, strict=True)] == [True] * 3
    now = from_yaml(done.config)
    old = config(*BEGUN, f"data.repo={repository}", f"output.cache={cache}")
    expected = replace(old, training=replace(old.training, val_every=3), stability=replace(old.stability, max_skips=2))
    assert now == expected


def test_the_same_command_goes_on_with_another_logger_or_pace(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    begun = stopped_at(trained, 1, *BEGUN)
    done = trained(*BEGUN, "training.val_every=3")
    assert done.path == begun.path and "from here on: training.val_every=3" in capsys.readouterr().out
