"""A job of a multirun, as `job.json` in its folder says: what it was asked for, and how it ended."""

import json
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

FILE = "job.json"


class State(Enum):
    """How far a job came."""

    running = "running"
    """Or ended from outside: nothing was written after that."""
    finished = "finished"
    failed = "failed"
    inapplicable = "inapplicable"
    """What it would have varied does not act here."""


@dataclass(frozen=True)
class Job:
    """One job."""

    overrides: tuple[str, ...]
    """Of the command line and of the sweep, Hydra's own left out."""
    state: State = State.running
    reason: str = ""
    """Why it failed or does not apply, in one line."""
    exit_code: int = 0

    def write(self, folder: Path) -> None:
        """Put it into the job's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(asdict(self) | {"state": self.state.value}, indent=2))


def read(sweep: Path) -> dict[Path, Job]:
    """The jobs of a multirun by folder, in the order of their numbers."""
    found = {}
    for path in sorted(sweep.glob(f"*/{FILE}"), key=lambda path: (len(path.parent.name), path.parent.name)):
        plain = json.loads(path.read_text())
        found[path.parent] = Job(tuple(plain["overrides"]), State(plain["state"]), plain["reason"], plain["exit_code"])
    return found
