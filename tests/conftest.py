"""What several tests need: a small real git repository, and the program run as a user runs it.

Imports torch and what uses it where they act: the process that hands tests to others waits for this module, and needs none of them.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from elite.runfolder import RunFolder

pytest_plugins = ["tests.disks"]
# Tests on a GPU do without it.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # How long an example takes says more of the machine than of the code.
    settings.register_profile("unhurried", deadline=None)
    settings.load_profile("unhurried")
ROOT = Path(__file__).parents[1]
Program = Callable[..., subprocess.CompletedProcess[str]]
Trained = Callable[..., "RunFolder"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The suite runs two processes side by side, and tiny tensors gain nothing from more threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def thawed() -> Iterator[list[bool]]:
    """Whether the collector visits old objects, as the last of these says. Asking it takes it 50 ms: it counts them."""
    states, thaw = [True], gc.unfreeze

    def unfreeze() -> None:
        states.append(True)
        thaw()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", unfreeze)
        yield states


@pytest.fixture(autouse=True)
def old_objects_rest(thawed: list[bool]) -> None:
    """The collector passes over what the session has imported and collected, half a second's worth, at the beginning and end of every
    training loop; those hand back what they have frozen, and this with it."""
    if thawed.pop():
        gc.freeze()
    thawed[:] = [False]


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
    """`train.py` in a process of its own, in an empty folder, on the sample repository. A fork, for a new process imports everything again;
    training processes, which it starts, are new ones, and tests that send signals start all of it anew."""

    def call(*overrides: str, timeout: float = 300, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        defaults = [f"output.cache={cache}"]
        if not any(word.startswith("data.repo") for word in overrides):
            defaults.append(f"data.repo={repository}")
        variables = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", **(environment or {})}
        command = [str(ROOT / "train.py"), *overrides, *defaults]
        # Beside the folder, which is to hold what the program writes alone.
        said = [tmp_path.with_name(f"{tmp_path.name}.{stream}") for stream in ("stdout", "stderr")]
        process = multiprocessing.get_context("fork").Process(target=_main, args=(command, tmp_path, variables, said))
        process.start()
        process.join(timeout)
        # Of no effect on what has ended.
        process.kill()
        process.join()
        assert process.exitcode is not None
        output, errors = (path.read_text() for path in said)
        return subprocess.CompletedProcess(command, process.exitcode, output, errors)

    return call


def _main(command: list[str], folder: Path, variables: dict[str, str], said: list[Path]) -> None:
    """Become that program."""
    os.chdir(folder)
    os.environ.update(variables)
    for number, path in enumerate(said, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


@pytest.fixture
def trained(tmp_path: Path, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """A run in this process, as under torchrun: everything but the launch, without importing all libraries twice more."""
    from elite import compose, modes, worker
    from elite.distributed.ranks import joined

    monkeypatch.chdir(tmp_path)

    def call(*overrides: str) -> RunFolder:
        folder, _ = modes._prepare(compose.from_overrides(f"output.cache={cache}", f"data.repo={repository}", *overrides))
        with joined() as ranks:
            worker.train(folder, ranks)
        return folder

    return call
