"""Start the training in child processes, one a GPU, through torch's elastic launcher."""

import logging
import os
import signal
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from elite.config import CONF_DIR
from elite.distributed.ranks import place
from elite.errors import EliteError, Preempted

SHUTDOWN_S = 600
"""How long an interrupted process may take to finish its step and save."""
LAST_WORDS = "error.txt"
"""File of a run folder in which a process that fails leaves its reason, one line."""
SAVED = "saved.txt"
"""File of a run folder in which a process that a signal ended says what it saved, one line."""
INTERRUPTED = 130
"""Exit code of a process that Ctrl+C ended."""
PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
"""Signals that the launcher hands to the training processes."""
PREEMPTING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals by which a scheduler or the system, not a person, ends a run."""

HUNG = 70
"""Exit code of a process that its watchdog has ended (elite/distributed/watchdog.py): an internal error, in sysexits' words."""


def leave_last_words(folder: Path, reason: str) -> None:
    """Leave the reason why this process fails, unless another rank has: what comes after the first failure follows from it."""
    rank, world = place()[1:]
    # A full disk may be the very reason; it has been shown, and must not be replaced by that of these words.
    with suppress(OSError), (folder / LAST_WORDS).open("x") as file:
        file.write(f"rank {rank}: {reason}" if world > 1 else reason)


@contextmanager
def _own_signals() -> Iterator[None]:
    """The launcher leaves its handlers behind; between the jobs of a multirun an interrupt must mean what it meant before."""
    before = {number: signal.getsignal(number) for number in map(signal.Signals.__getitem__, PASSED_ON)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _own_name() -> Iterator[None]:
    """The launcher asks for the host's full name at each of its events, and nobody reads it. Where no name server answers, as on a node
    without network, that is seconds each time."""
    before = socket.getfqdn
    socket.getfqdn = lambda name="": name or socket.gethostname()
    try:
        yield
    finally:
        socket.getfqdn = before


class WorkerError(EliteError):
    """A child process ended with an error.

    Args:
        reason: what was left in the run folder; empty if nobody was asked.
        rank: which one, among several.
    """

    def __init__(self, exit_code: int, reason: str = "", rank: int | None = None) -> None:
        killed = " (killed from outside: out of host memory?)" if exit_code == 128 + signal.SIGKILL else ""
        said = f": {reason}" if reason else ""
        of = f" of rank {rank}" if rank is not None else ""
        super().__init__(
            f"the training process{of} ended with exit code {exit_code}{killed}{said}",
            "the same command continues from the last checkpoint",
        )
        self.exit_code = exit_code
        # Errors of ours were shown by the process itself.
        self.shown = exit_code == EliteError.exit_code


def launch(folder: Path, processes: int) -> None:
    """Run `elite.worker` on `folder` in `processes` children and wait for them.

    Each run is thus a process of its own, also in a multirun: peak memory is its own and trackers don't mix.

    Raises:
        WorkerError: a child failed; the root cause was printed by the child itself, once.
        Preempted: a scheduler or the system ended it; the children have saved and ended.
        KeyboardInterrupt: the user interrupted; the children have saved and ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The launcher would report a failed child a second and third time, and a signal too. Its modules' loggers have their own levels.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # The package is found beside the program, whatever folder the user stands in.
    start = f"import sys; sys.path.insert(0, {str(CONF_DIR.parent)!r}); from elite.worker import main; main()"
    # What is ignored stays so: nohup does that with the terminal's end.
    heard = ",".join(name for name in PASSED_ON if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN)
    # torch before 2.12 does not have them all: it waits for half a minute, and Slurm's warning ends it.
    options = {"shutdown_timeout": SHUTDOWN_S, "signals_to_handle": heard}
    known = {name: value for name, value in options.items() if name in LaunchConfig.__dataclass_fields__}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        **known,  # type: ignore[arg-type]
    )
    last_words, left = folder / LAST_WORDS, folder / SAVED
    last_words.unlink(missing_ok=True)
    left.unlink(missing_ok=True)
    try:
        with _own_signals(), _own_name():
            elastic_launch(config, sys.executable)("-c", start, str(folder))
    except ChildFailedError as error:
        rank, code = _first_to_fail({rank: failure.exitcode for rank, failure in error.failures.items()}, error.get_first_failure()[0])
        if code in (Preempted.exit_code, INTERRUPTED):
            # The signal came to the children alone.
            number = signal.SIGINT if code == INTERRUPTED else signal.SIGTERM
            raise ended_by(number, _words(left)) from error
        raise WorkerError(code if code > 0 else 128 - code, _words(last_words), rank if processes > 1 else None) from error
    except SignalException as error:
        raise ended_by(error.sigval, _words(left)) from error


def _first_to_fail(codes: dict[int, int], noticed: int) -> tuple[int, int]:
    """The rank whose end explains the others', and its code (negative: a signal).

    Args:
        noticed: the rank whose end the launcher saw first; several may have ended between two looks.
    """
    # The launcher itself ends the rest by SIGTERM, and by SIGKILL those that do not hear it, as one that another's watchdog waited for.
    hung = [rank for rank, code in codes.items() if code == HUNG]
    # A rank that lost a killed one fails in its own words soon after.
    killed = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
    rank = (*hung, *killed, noticed)[0]
    return rank, codes[rank]


def ended_by(number: int, left: str) -> BaseException:
    """What a run that a signal ended is to the program.

    Args:
        left: what it saved, in words; empty: nothing.
    """
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    if number in PREEMPTING:
        return Preempted(f"{left or 'nothing was saved after the last checkpoint'}; the same command continues")
    return WorkerError(128 + number)


def left_behind(folder: Path, number: int, step: int) -> int:
    """Say in the run folder what a process saved that a signal ended; returns its exit code."""
    (folder / SAVED).write_text(saved(step))
    return INTERRUPTED if number == signal.SIGINT else Preempted.exit_code


def saved(step: int) -> str:
    """In words."""
    return f"saved after step {step}"


def _words(file: Path) -> str:
    return file.read_text() if file.is_file() else ""
