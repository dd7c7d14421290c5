"""What several tests need: a small real git repository, and the program run as a user runs it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from elite import compose, modes, worker
from elite.config import CONF_DIR
from elite.distributed.ranks import joined
from elite.runfolder import RunFolder

pytest_plugins = ["tests.disks"]
ROOT = CONF_DIR.parent
Program = Callable[..., subprocess.CompletedProcess[str]]
Trained = Callable[..., RunFolder]

# The suite runs two processes side by side, and tiny tensors gain nothing from more threads.
torch.set_num_threads(1)


def git(folder: Path, *arguments: str) -> None:
    """Run git in `folder`, as nobody in particular."""
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def make_repository(folder: Path, files: int = 12, lines: int = 40) -> Path:
    """A git repository of small Python files that differ."""
    folder.mkdir(parents=True)
    for i in range(files):
        body = "\n".join(f"def f{i}_{j}(x):\n    return x * {i} + {j}\n" for j in range(lines))
        path = folder / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'"""Module {i}."""\n\n{body}')
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "all")
    return folder


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of a dozen small files."""
    return make_repository(tmp_path_factory.mktemp("repositories") / "sample")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this test session's own."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def program(tmp_path: Path, repository: Path, cache: Path) -> Program:
    """`train.py` in a process of its own, in an empty folder, on the sample repository."""

    def call(*overrides: str, timeout: float = 300, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        defaults = [f"output.cache={cache}"]
        if not any(word.startswith("data.repo") for word in overrides):
            defaults.append(f"data.repo={repository}")
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **(environment or {})}
        command = [sys.executable, str(ROOT / "train.py"), *overrides, *defaults]
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=timeout, check=False)

    return call


@pytest.fixture
def trained(tmp_path: Path, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """A run in this process, as under torchrun: everything but the launch, without importing all libraries twice more."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides: str) -> RunFolder:
        folder, _ = modes._prepare(compose.from_overrides(f"output.cache={cache}", f"data.repo={repository}", *overrides))
        with joined() as ranks:
            worker.train(folder, ranks)
        return folder

    return call
