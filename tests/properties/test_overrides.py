"""Whatever is typed: a run that cannot be ends in three lines at most, exit code 2, nothing half-written; one that can be has a plan."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from elite import compose, modes
from elite.data.tokens import open_store
from elite.errors import EliteError
from elite.plan.values import PATHS, RULES
from tests.conftest import ROOT
from tests.properties.overrides import ELSEWHERE, Wrong, leaves, numeric, right, wrong

WRONG = wrong(300, seed=7)
RIGHT = right(100, seed=7)
EVERY = 20
"""Of them one in so many is tried in the ordinary suite."""


def base(repository: Path, cache: Path) -> list[str]:
    """A tiny run that plans, before what is tried."""
    return ["debug=tiny", "mode=plan", "hardware=rtx3090", f"output.cache={cache}", f"data.repo={repository}"]


def snapshot(*folders: Path) -> dict[str, Any]:
    """Every file and folder below these, with its size and time."""
    found = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            status = path.lstat()
            found[str(path)] = (status.st_mode, status.st_size if path.is_file() else 0, status.st_mtime_ns)
    return found


def assert_nothing_half_written(cache: Path) -> None:
    """What a run that fails later has put into the cache is whole: it got its name when it was."""
    assert not [path for path in cache.rglob(".*") if path.name.startswith((".building", ".partial"))]
    assert all(open_store(folder) is not None for folder in cache.glob("tokens/*"))


def said(overrides: list[str]) -> str:
    """What the program would print of these; raises what it would end with a traceback for."""
    try:
        composed = compose.from_overrides(*overrides)
    # Hydra lets a ValueError through; `compose.at_the_edge` tells it from one of ours, as here.
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        return str(compose.explain(error))
    except EliteError as error:
        return _words(error)
    try:
        modes.run(composed)
    except EliteError as error:
        return _words(error)
    return ""


def _words(error: EliteError) -> str:
    assert error.exit_code == 2
    return str(error)


def check_wrong(sets: list[Wrong], repository: Path, cache: Path, here: Path) -> None:
    before = snapshot(here, repository)
    accepted = []
    for one in sets:
        try:
            message = said([*base(repository, cache), *one.overrides])
        except Exception as error:
            accepted.append(f"{one.overrides} ({one.why}): {type(error).__name__}: {str(error)[:200]}")
            continue
        if not message or len(message.splitlines()) > 3 or not message.isprintable() and "\x1b" in message:
            accepted.append(f"{one.overrides} ({one.why}): {message[:300] or 'was accepted'}")
    assert not accepted, "\n".join(accepted)
    assert snapshot(here, repository) == before
    assert_nothing_half_written(cache)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_some_wrong_overrides(repository: Path, cache: Path, here: Path) -> None:
    check_wrong(WRONG[::EVERY], repository, cache, here)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(1, EVERY))
def test_every_wrong_override(part: int, repository: Path, cache: Path, here: Path) -> None:
    check_wrong(WRONG[part::EVERY], repository, cache, here)


def check_right(sets: list[tuple[str, ...]], repository: Path, cache: Path) -> None:
    refused = []
    for overrides in sets:
        try:
            message = said([*base(repository, cache), *overrides])
        except Exception as error:
            message = f"{type(error).__name__}: {str(error)[:300]}"
        if message:
            refused.append(f"{overrides}: {message}")
    assert not refused, "\n".join(refused)


def test_some_right_overrides_have_a_plan(repository: Path, cache: Path, here: Path) -> None:
    check_right(RIGHT[::EVERY], repository, cache)
    assert not list(here.iterdir())


@pytest.mark.faults
@pytest.mark.parametrize("part", range(1, EVERY))
def test_every_right_override_has_a_plan(part: int, repository: Path, cache: Path, here: Path) -> None:
    check_right(RIGHT[part::EVERY], repository, cache)
    assert not list(here.iterdir())


def test_the_sets_reach_every_field_and_every_kind() -> None:
    names = {leaf.name for leaf in leaves()}
    assert len(WRONG) == 300 and len(RIGHT) == 100
    assert set(PATHS) <= names and set(ELSEWHERE) <= names
    assert {name for rule in RULES for name in rule.fields} <= names
    touched = {word.split("=")[0] for one in WRONG for word in one.overrides}
    assert {name.split(".")[0] for name in names} <= {name.split(".")[0] for name in touched}


def test_no_number_may_be_negative_endless_or_absurd() -> None:
    """A new field falls under this rule by itself."""
    from dataclasses import replace

    from elite.errors import ConfigError
    from elite.plan.values import check_values

    config = compose.from_overrides("debug=tiny").config
    for leaf in leaves():
        group, _, field = leaf.name.rpartition(".")
        if not numeric(leaf) or group.startswith("optimizations"):
            continue
        for value in (-1, 10**30) if leaf.kinds == (int,) else (-1.0, float("nan"), float("inf"), 1e300):
            changed = replace(config, **({group: replace(getattr(config, group), **{field: value})} if group else {field: value}))
            with pytest.raises(ConfigError, match=f"{leaf.name}={value}".replace("+", "[+]")):
                check_values(changed)


def through_the_command_line(one: Wrong, repository: Path, cache: Path, here: Path) -> None:
    before = snapshot(here, repository)
    command = [sys.executable, str(ROOT / "train.py"), *base(repository, cache), *one.overrides]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=here, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2, (one, done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stdout + done.stderr and done.stderr.count("error:") == 1, (one, done.stderr)
    message = done.stderr[done.stderr.index("error:") :]
    assert len(message.strip().splitlines()) <= 3 and "\x1b" not in message, (one, message)
    assert snapshot(here, repository) == before
    assert_nothing_half_written(cache)


CLI = [one for one in WRONG if one.why != "no such text"][3 :: len(WRONG) // 15][:12]
TRICKS = [
    Wrong(("hydra.run.dir=/proc/none/x",), "Hydra's own folder cannot be made"),
    Wrong(("+hydra.callbacks.x._target_=nonsense.Nothing",), "no such callback"),
    Wrong(("--config-name=nonsense",), "no such configuration"),
]


@pytest.mark.parametrize("one", CLI[:3], ids=lambda one: one.overrides[0][:40])
def test_wrong_overrides_through_the_command_line(one: Wrong, repository: Path, cache: Path, here: Path) -> None:
    through_the_command_line(one, repository, cache, here)


@pytest.mark.faults
@pytest.mark.parametrize("one", [*CLI[3:], *TRICKS], ids=lambda one: one.overrides[0][:40])
def test_more_wrong_overrides_through_the_command_line(one: Wrong, repository: Path, cache: Path, here: Path) -> None:
    through_the_command_line(one, repository, cache, here)
