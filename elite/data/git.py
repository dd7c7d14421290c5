"""What git says of a repository, without letting the repository say what git does.

A repository is data, and its `.git` may come with it: from an archive, a share, a build. Its configuration can name programs that git
runs (`core.fsmonitor` even for a listing, hooks, transports that fetch what is missing), so these are turned off on the command line,
which wins over it. What the user's and the machine's own configuration says holds, `safe.directory` first of all.
"""

import os
import subprocess
from pathlib import Path

from elite.errors import DataError

SYMLINK, SUBMODULE = "120000", "160000"
"""Modes of what is in a git tree and is no file."""
INERT = (
    *("-c", "core.fsmonitor=false"),
    *("-c", f"core.hooksPath={os.devnull}"),
    *("-c", "safe.bareRepository=explicit"),
    "--no-optional-locks",
    "--no-pager",
)
"""Options of every call: nothing that the repository configures is run or fetched, and nothing is written there."""
TIMEOUT_S = 120.0
"""A listing of a million files takes seconds; a configuration that is a pipe takes for ever."""


def tracked_files(root: Path, remedy: str) -> dict[str, str]:
    """Path → mode of every file in git's index; a path in conflict is listed several times there and counts once.

    Raises:
        DataError: git is not installed, refuses, or does not answer.
    """
    # A git hook exports GIT_DIR and the like, which would override the folder we ask about.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    # No repository further up, no question at the terminal, and no transport: what a partial clone lacks is not fetched. The variable
    # wins over a `protocol.NAME.allow` of the repository, which an option would not.
    environment |= {"GIT_CEILING_DIRECTORIES": str(root.resolve().parent), "GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": "none"}
    command = ["git", *INERT, "-C", str(root), "ls-files", "--stage", "-z"]
    try:
        listing = subprocess.run(
            command, capture_output=True, check=True, env=environment, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S
        ).stdout
    except FileNotFoundError:
        raise DataError("git is not installed, and only files that git tracks are read", "install git, or use data=jsonl") from None
    except subprocess.TimeoutExpired:
        problem = f"{root}: git has not listed its files after {TIMEOUT_S:.0f} s"
        raise DataError(problem, "clone it anew (a pipe in .git stops git), or " + remedy) from None
    except subprocess.CalledProcessError as error:
        said = (os.fsdecode(error.stderr).strip().splitlines() or ["no message"])[0]
        raise DataError(f"{root}: git cannot list its files: {said}", "make `git ls-files` work there, or " + remedy) from None
    tracked = {}
    for entry in listing.split(b"\0")[:-1]:
        attributes, _, path = entry.partition(b"\t")
        tracked[os.fsdecode(path)] = attributes.split()[0].decode()
    return tracked
