"""The run folder: the contract between a run, what reads it later, and a run that continues it.

config.yaml        the resolved configuration           metrics.jsonl   a line a step, a line a validation
plan.json          what was predicted                   checkpoints/    step_NNNNNN/
environment.json   versions, device, commit, command    final/          the adapter or model
run.json           identity: request, tokens, tracker   summary.json    written when the run has ended well
micro_batch.json   how training.micro_batch=auto ended  failure.json    how memory ran out, if it did
preflight.json     what was measured before a step      report.html     all of it on one page, for people
job.json           as a job of a multirun               error.txt       why a process failed, if one did
difficulty.json    how the untrained model found each file, if it was asked
base/              a converted model, where adapters     saved.txt       what was saved when a signal ended it
                   belong to it                          checkpoint_now  made by a person: save after the step at work
mid_step/          what the step at work has done, if that is kept
evaluation.json    what mode=evaluate found
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import platform
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import datetime
from itertools import chain, count
from pathlib import Path
from typing import Any

from elite import __version__
from elite.ablation import AblationConfig
from elite.config import Mode, OutputConfig, RunConfig
from elite.continued import as_begun
from elite.errors import CheckpointError, ConfigError
from elite.facts import Device
from elite.jsonfile import read_object
from elite.schema import to_yaml

log = logging.getLogger("elite.runfolder")
ANOTHER = "resume=never starts another run; or put the file back from a copy"
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "triton",
    "accelerate",
    "deepspeed",
    "tokenizers",
    "numpy",
    "hydra-core",
    "wandb",
)


class RunFolder:
    """Paths inside a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.plan = path / "plan.json"
        self.environment = path / "environment.json"
        self.identity = path / "run.json"
        self.micro_batch = path / "micro_batch.json"
        self.preflight = path / "preflight.json"
        self.difficulty = path / "difficulty.json"
        self.failure = path / "failure.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.mid_step = path / "mid_step"
        self.final = path / "final"
        self.base = path / "base"
        self.summary = path / "summary.json"
        self.evaluation = path / "evaluation.json"
        self._lock = path / ".lock"

    @property
    def finished(self) -> bool:
        """Whether the run in it ended well."""
        return self.summary.is_file()

    @property
    def begun(self) -> bool:
        """Whether a run in it has saved something and has not ended well: it goes on from there."""
        return not self.finished and self.identity.is_file() and any(self.checkpoints.glob("step_*"))

    @property
    def resumable(self) -> bool:
        """Whether an interrupted run can go on in it; one that another process is training is not interrupted."""
        if not self.begun:
            return False
        try:
            with self.held():
                return True
        except CheckpointError:
            return False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder against other processes; the lock ends with the process, however that ends.

        Raises:
            CheckpointError: another process holds it.
        """
        with self._lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointError(f"another process is training in {self.path}", "wait for it, or resume=never") from error
            yield

    def asked_for(self, request: str) -> bool:
        """Whether what is in it was asked for in these words (`request_key`)."""
        try:
            return self.identity.is_file() and self.read_identity()["request"] == request
        except CheckpointError as error:
            # Among the runs of a folder one that is damaged is no reason not to begin another.
            log.warning("%s: not continued", error.problem)
            return False

    def begin_again(self) -> None:
        """Make it fit for a new run, which the one in it never came to: it saved nothing."""
        assert not self.finished and not self.begun
        with self.held():
            self.identity.unlink()
            self.metrics.unlink(missing_ok=True)

    def rewrite_config(self, config: RunConfig) -> None:
        """Go on under another configuration."""
        written = self.config.with_suffix(".partial")
        written.write_text(to_yaml(config))
        written.rename(self.config)

    def read_identity(self) -> dict[str, Any]:
        """Contents of `run.json`.

        Raises:
            CheckpointError: it is damaged.
        """
        identity = read_object(self.identity, CheckpointError, ANOTHER)
        if not all(isinstance(identity.get(name), str) for name in ("request", "tokens", "tracker_id")):
            raise CheckpointError(f"{self.identity} is damaged: request, tokens or tracker_id is missing", ANOTHER)
        return identity

    def best_val_loss(self) -> float:
        """What the run that ended well reached.

        Raises:
            CheckpointError: its summary is damaged.
        """
        found = read_object(self.summary, CheckpointError, ANOTHER).get("best_val_loss")
        if not isinstance(found, int | float):
            raise CheckpointError(f"{self.summary} is damaged: best_val_loss is {found!r}", ANOTHER)
        return float(found)


def request_key(config: RunConfig, origin: str) -> str:
    """Identity of what was asked for: two runs with one key train the same thing on the same data source.

    Args:
        config: as composed, before `auto` is resolved. Where it writes, logs, whether it resumes, and what may change while it goes on
            (elite/continued.py) don't count; what an ablation varies stands in its optimizations.
        origin: the data source that was found.
    """
    relevant = replace(as_begun(config), mode=Mode.train, resume="auto", output=OutputConfig(), ablation=AblationConfig())
    text = to_yaml(relevant) + origin
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def interrupted_run(root: Path, key: str) -> RunFolder | None:
    """The newest resumable run under `root` that was asked for in the same words."""
    for identity in sorted(root.glob("*/*/run.json"), reverse=True):
        folder = RunFolder(identity.parent)
        if folder.resumable and folder.asked_for(key):
            return folder
    return None


def new_folder(config: RunConfig, name: str, now: datetime) -> RunFolder:
    """Create this run's folder.

    Raises:
        ConfigError: it cannot be written.
    """
    output = config.output
    parent = Path(output.root) / f"{now:%Y-%m-%d}"
    path = (Path(output.folder) if output.folder else parent / f"{now:%H-%M-%S}_{name}").expanduser().absolute()
    try:
        path = _made(path, shared=output.folder is not None)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"the run folder {path} cannot be written: {error.strerror}", "output.root=FOLDER or output.folder=FOLDER"
        ) from error
    if (path / "run.json").exists():
        raise ConfigError(f"output.folder={path} already holds a run", "another folder, or resume=FOLDER to continue that run")
    return RunFolder(path)


def _made(path: Path, shared: bool) -> Path:
    """The folder, created; beside it, with a number, if it is not `shared` and another run of the same second has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in chain([path.name], (f"{path.name}_{n}" for n in count(2))):
        try:
            path.with_name(name).mkdir(exist_ok=shared)
            return path.with_name(name)
        except FileExistsError:
            if shared:
                raise
    raise AssertionError("there is always a next number")


def write_start(folder: RunFolder, config: RunConfig, plan: dict[str, Any], device: Device, request: str, tokens: Path) -> None:
    """Write everything that is known before training: configuration, plan, environment, identity."""
    write_request(folder, config, plan, device)
    identity = {"request": request, "tokens": str(tokens), "tracker_id": uuid.uuid4().hex[:8]}
    # Last: a folder without it is no run.
    folder.identity.write_text(json.dumps(identity, indent=2))


def write_request(folder: RunFolder, config: RunConfig, plan: dict[str, Any], device: Device) -> None:
    """Write what was asked for and planned, on which machine. A folder with this alone is no run that could be continued."""
    folder.config.write_text(to_yaml(config))
    folder.plan.write_text(json.dumps(plan, indent=2))
    folder.environment.write_text(json.dumps(environment() | {"device": asdict(device)}, indent=2))


def environment() -> dict[str, Any]:
    """Versions, machine, commit and command line: what a measurement must name."""
    versions: dict[str, str | None] = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "elite": __version__,
        "commit": _commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """Commit of this code, with `+` if the tree differs from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit and commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:
        return None
