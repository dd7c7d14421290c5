"""What a person sees while a run goes on: one live line on a terminal, a plain line now and then in a log."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_LINES = 20
"""Step lines in a log of a run, however many steps it has."""


class Screen:
    """Prints to `console`; `steps` is the last step's number, `first` the step already done."""

    def __init__(self, console: Console, steps: int, first: int) -> None:
        self._console = console
        self._steps = steps
        self._live: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
            )
            self._live = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._live.add_task("", total=steps, completed=first)
            self._live.start()

    def step(self, record: dict[str, float]) -> None:
        memory = record["gpu_peak_bytes"] or record["host_rss_bytes"]
        text = f"loss {record['loss']:.3f}  lr {record['lr']:.1e}  {record['tokens_per_s']:,.0f} tok/s  {memory / 2**30:.2f} GiB"
        step = int(record["step"])
        if self._live:
            self._live.update(self._task, completed=step, description=text)
        elif step == self._steps or step == 1 or step % max(1, self._steps // PLAIN_LINES) == 0:
            self._console.print(f"step {step}/{self._steps}  {text}  {record['step_time_s']:.1f} s")

    def validation(self, record: dict[str, float]) -> None:
        worth = record["val_loss_alone"] - record["val_loss"]
        self._console.print(
            f"step {int(record['step'])}: validation loss {record['val_loss']:.4f} with the repository before it, "
            f"{record['val_loss_alone']:.4f} alone (context is worth {worth:+.4f})",
        )

    def end(self, summary: dict[str, Any]) -> None:
        if self._live:
            self._live.stop()
