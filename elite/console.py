"""The terminal: one console for results, log lines on stderr, libraries silenced where they only narrate."""

import logging
import warnings

from rich.console import Console
from rich.logging import RichHandler
from transformers.utils import logging as transformers_logging

from elite.printable import lines

console = Console(highlight=False, soft_wrap=True)

# While it is imported, before `start_logging`, it warns on some CPUs that an optional package of its own is absent.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _fit_to_show(record: logging.LogRecord) -> bool:
    """Log lines name files of others."""
    record.msg, record.args = lines(record.getMessage()), ()
    return True


def start_logging() -> None:
    """Our own log lines from INFO, other libraries' from ERROR, no progress bars but ours."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    handler.addFilter(_fit_to_show)
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[handler])
    logging.getLogger("elite").setLevel(logging.INFO)
    # Deprecations inside libraries are for their authors.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    # A step whose update is skipped is one of the schedule all the same, also if it is the first.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
