"""Errors a user can act on: what was given, the rule it breaks, what to do instead.

They reach the terminal as one to three lines and exit code 2; anything else that escapes is a defect of ours and keeps its traceback.
"""

from elite.printable import one_line

LONGEST = 1000
"""Characters of a problem or remedy that are shown; what was typed may be of any length."""


class EliteError(Exception):
    """Base of every error caused by input or circumstances rather than by a defect.

    Args:
        problem: the value and the rule it breaks, one line.
        remedy: what to type or change, one line.
    """

    exit_code = 2
    heading = "error"
    """What it is called where it is shown."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.shown = False
        """Whether it has been printed; an error is said once."""
        # They quote names and values of others, which may hold line breaks and control characters.
        self.problem, self.remedy = _shown(problem), _shown(remedy)
        super().__init__(f"{self.problem}\n  remedy: {self.remedy}" if remedy else self.problem)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Exceptions are pickled by their args, which here are the joined text; rebuild from the parts instead.
        return type(self), (self.problem, self.remedy)


def _shown(text: str) -> str:
    """On one line, its middle left out where it is too long."""
    line = one_line(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"


class ConfigError(EliteError):
    """A value in the configuration is unknown, of the wrong type or out of range."""


class PlanError(EliteError):
    """The run as configured cannot work on the hardware, or two of its parts exclude each other."""


class InapplicableError(PlanError):
    """A run that would vary something which does not act on this model and machine: it would show nothing."""


class DataError(EliteError):
    """The corpus is missing, unreadable or too small."""


class ModelError(EliteError):
    """The model or its tokenizer cannot be found or is of an unsupported kind."""


class CheckpointError(EliteError):
    """A checkpoint is missing, incomplete or belongs to another run."""


class LoggerError(EliteError):
    """A logger that was asked for does not start."""


class Preempted(EliteError):
    """A signal of a scheduler or the system ended the run; the same command continues it.

    Args:
        problem: what was saved.
    """

    exit_code = 75
    """EX_TEMPFAIL of sysexits.h: not done, to be tried again; what a scheduler requeues on."""
    heading = "preempted"
