"""`mode=calibrate` and its command: every configuration of a draw measured beside its plan, and how far the plans were off.

A file holds the draw, what has been measured of it and the machine. It is written after each configuration, so that a rerun goes on where
the last one ended.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elite import hardware
from elite.bench.assemble import write
from elite.bench.calibrate.measure import FAILED, Machine, measured, timed_again
from elite.bench.calibrate.sample import SETS, SPACES, Drawn, draw
from elite.config import RunConfig
from elite.console import console
from elite.errors import ConfigError
from elite.plan.values import check_values
from elite.plan.words import duration
from elite.report.calibration import RAN, Row, errors, summary_lines
from elite.runfolder import environment


@dataclass(frozen=True)
class Request:
    """Which grid, and how much of it."""

    file: Path
    seed: int = SETS["held_out"]
    count: int = 40
    card: str = "h100"
    """Hardware preset for which configurations are drawn."""
    space: str = "gpu"
    seconds: float | None = None
    """No configuration is begun later than this."""
    fresh: bool = False
    """Each configuration in a process of its own."""
    cache: str | None = None

    @property
    def draw(self) -> dict[str, Any]:
        """What decides the configurations."""
        return {"seed": self.seed, "count": self.count, "space": self.space, "card": self.card}


def calibrate(config: RunConfig) -> None:
    """`mode=calibrate`."""
    check_values(config)
    options = config.calibrate
    gpus = [] if config.hardware.name == "cpu" else hardware.nvml_gpus()
    request = Request(Path(options.file), options.seed, options.count, seconds=options.seconds, cache=config.output.cache)
    grid(replace(request, card=hardware.rates(gpus[0]).name) if gpus else replace(request, space="cpu"))


def grid(request: Request) -> dict[str, Any]:
    """Measure what is left of a grid, and time anew what others slowed; returns what the file gets.

    Raises:
        ConfigError: the file holds another draw.
    """
    began, found = time.perf_counter(), drawn(request)
    machine = None if request.fresh else Machine(request.cache)

    def is_late() -> bool:
        return request.seconds is not None and time.perf_counter() - began > request.seconds

    for one in left(found):
        if is_late():
            console.print(f"{len(left(found))} configurations are left; the same command goes on with them")
            break
        if machine is None:
            found = _in_its_own_process(request, one)
        else:
            keep(request.file, found, measured(one, machine, request.cache), machine.name)
        console.print(said(found["runs"][-1]), markup=False)
    for run in found["runs"]:
        # By now whoever did may be gone.
        if machine is not None and run.get("disturbed") and not is_late():
            timed_again(run, machine, request.cache)
            _save(request.file, found)
            console.print(said(run), markup=False)
    for line in summary_lines(found):
        console.print(line, markup=False)
    return found


def drawn(request: Request) -> dict[str, Any]:
    """The file of this request; drawn now and written if there is none.

    Raises:
        ConfigError: it holds another draw.
    """
    if request.file.exists():
        found: dict[str, Any] = json.loads(request.file.read_text())
        if found.get("draw") != request.draw:
            raise ConfigError(f"{request.file} holds another draw: {found.get('draw')} instead of {request.draw}", "another file")
        return found
    configurations = draw(request.seed, request.count, SPACES[request.space], request.card)
    found = {"environment": environment(), "device": "", "draw": request.draw}
    found |= {"configurations": [one.to_dict() for one in configurations], "runs": []}
    write(request.file, found)
    return found


def left(found: dict[str, Any]) -> list[Drawn]:
    """Configurations that have not been measured."""
    done = {run["name"] for run in found["runs"]}
    return [Drawn.from_dict(plain) for plain in found["configurations"] if plain["name"] not in done]


def keep(file: Path, found: dict[str, Any], run: dict[str, Any], device: str) -> None:
    """Add a run to a file."""
    found["environment"], found["device"] = environment(), device
    found["runs"].append(run)
    _save(file, found)


def _save(file: Path, found: dict[str, Any]) -> None:
    beside = file.with_name(f"{file.name}.new")
    write(beside, found)
    beside.replace(file)


def one_of(file: Path, name: str, cache: str | None = None) -> None:
    """Measure one configuration of a file in this process.

    Raises:
        ConfigError: it is not among those that are left.
    """
    found: dict[str, Any] = json.loads(file.read_text())
    chosen = [one for one in left(found) if one.name == name]
    if not chosen:
        raise ConfigError(f"--only {name}: not among the configurations left in {file}", "one of those it lists, not measured yet")
    machine = Machine(cache)
    keep(file, found, measured(chosen[0], machine, cache), machine.name)


def _in_its_own_process(request: Request, one: Drawn) -> dict[str, Any]:
    command = [sys.executable, "-m", "elite.bench.calibrate", str(request.file), "--only", one.name]
    command += ["--cache", request.cache] if request.cache else []
    done = subprocess.run(command, check=False)
    found: dict[str, Any] = json.loads(request.file.read_text())
    if one in left(found):
        # Killed, or left with a GPU that answers no more.
        lost = one.to_dict() | {"outcome": FAILED, "error": f"its process ended with {done.returncode}", "seconds": 0.0}
        keep(request.file, found, lost, found["device"])
    return found


def said(run: dict[str, Any]) -> str:
    """A line about a configuration: what it was, how it ended, how far its plan was off."""
    words = [
        word.partition("=")[2] for word in run["overrides"] if word.startswith(("model=", "executor=", "hardware=", "adapter.method="))
    ]
    sizes = {word.partition("=")[0]: word.partition("=")[2] for word in run["overrides"]}
    place = f"{run['name']}  {sizes['training.micro_batch']} × {int(sizes['tier.context']):,}  {' '.join(words)}"
    if run["outcome"] != RAN:
        return f"{place}  {run['outcome']} after {duration(run['seconds'])}: {run['error']}"
    off = ", ".join(f"{name} {value:+.1%}" for name, value in errors(Row.of(run)).items())
    return f"{place}  {duration(run['measured']['step_s'])} a step, {duration(run['seconds'])} in all; plan against measured: {off}"
