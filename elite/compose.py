"""Hydra's side of the configuration: composing it, composing it again with other choices, and saying plainly what is wrong with it."""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from elite.ablation import varied
from elite.config import CONF_DIR, TIERS, RunConfig
from elite.errors import ConfigError, EliteError, InapplicableError, Preempted
from elite.jobs import Job, State
from elite.schema import build, schema

ConfigStore.instance().store(name="schema", node=schema())


@dataclass(frozen=True)
class Composed:
    """A run as composed from groups and overrides, and the means to compose a neighbour of it."""

    config: RunConfig
    overrides: tuple[str, ...]
    """As typed on the command line, or chosen by the sweep."""
    job: str | None = None
    """Output folder of this job in a multirun."""

    def again(self, *overrides: str) -> "Composed":
        """The same request with further overrides, which win."""
        config = _placed(hydra.compose("config", [*self.overrides, *overrides]), self.job)
        return replace(self, config=config, overrides=(*self.overrides, *overrides))


def from_hydra(composed: DictConfig) -> Composed:
    """What `hydra.main` hands to the program."""
    context = HydraConfig.get()
    job = context.runtime.output_dir if context.mode is RunMode.MULTIRUN else None
    return Composed(_placed(composed, job), tuple(context.overrides.task), job)


def from_overrides(*overrides: str) -> Composed:
    """Compose outside `hydra.main` (tests, notebooks)."""
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return Composed(_placed(hydra.compose("config", list(overrides)), None), overrides)


def _placed(composed: DictConfig, job: str | None) -> RunConfig:
    """The configuration of one run: jobs of a multirun write where Hydra numbers them, and form one group in the tracker."""
    config = build(composed)
    config = replace(config, optimizations=varied(config.optimizations, config.ablation.variant))
    if job is None:
        return config
    group = group_of(config, Path(job).parent)
    return replace(config, output=replace(config.output, folder=job), logger=replace(config.logger, group=group))


def group_of(config: RunConfig, sweep: Path) -> str:
    """The tracker's name for all jobs of the multirun in this folder."""
    return config.logger.group or f"{sweep.parent.name}_{sweep.name}"


TIER_OPTIONS = ["auto", *TIERS]


def options(group: str) -> list[str]:
    """The options of a configuration group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def known_keys() -> list[str]:
    """Every dotted field name, and every group: what an override may start with."""

    def walk(node: DictConfig, prefix: str) -> list[str]:
        names = []
        for key in map(str, node):
            names.append(f"{prefix}{key}")
            child = node._get_node(key)
            if isinstance(child, DictConfig):
                names += walk(child, f"{prefix}{key}.")
        return names

    return walk(schema(), "") + sorted(folder.name for folder in CONF_DIR.iterdir() if folder.is_dir())


def explain(error: Exception) -> ConfigError:
    """Hydra's or OmegaConf's complaint as value, rule and remedy."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if group.startswith("hydra/"):
            # Hydra's plugins are named so: hydra-optuna-sweeper, hydra-joblib-launcher.
            return ConfigError(f"{group}={option} is not installed", f"pip install hydra-{option}-{group.removeprefix('hydra/')}")
        if not group:
            return ConfigError(f"--config-name={option} is unknown", "leave it out")
        return ConfigError(f"{group}={option} is unknown", _suggest(option, options(group)) or f"one of {', '.join(options(group))}")
    unknown = re.match(r"Could not override '([^']+)'", lines[0])
    if unknown:
        key = unknown[1]
        return ConfigError(f"{key} is not a field or group", _suggest(key, known_keys()) or "python train.py --cfg job shows every field")
    if error.__cause__ is not None and lines[0].startswith("Error merging"):
        rule = str(error.__cause__).splitlines()[0]
        return ConfigError(f"{lines[0].removeprefix('Error merging override ')}: {rule}", "python train.py --cfg job shows every field")
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override}: {lines[0]}", "quote values with spaces or brackets: 'name=\"a b\"'")
    return ConfigError(lines[0], "python train.py --help")


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""


def show(error: EliteError) -> None:
    """Print an error once, on stderr."""
    if not error.shown:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"{error.heading}: {error}", markup=False)
        error.shown = True


def as_job(program: Callable[[Composed], float | None], composed: DictConfig) -> float | None:
    """Run one job; returns what a search over settings would minimise.

    Of a multirun's jobs one that fails shows its error at once, says so in its folder and returns NaN: the others go on, and the multirun
    ends with its exit code (elite/report/multirun.py).
    """
    context = HydraConfig.get()
    if context.mode is RunMode.MULTIRUN:
        return _swept(program, composed, Path(context.runtime.output_dir), tuple(context.overrides.task))
    try:
        return program(from_hydra(composed))
    except EliteError as error:
        show(error)
        sys.exit(error.exit_code)


def _swept(program: Callable[[Composed], float | None], composed: DictConfig, folder: Path, overrides: tuple[str, ...]) -> float | None:
    job = Job(overrides)
    job.write(folder)
    try:
        value = program(from_hydra(composed))
    except Preempted as error:
        # The whole sweep was meant, and ends here as one that the same command continues; Hydra would begin the next job on an error.
        show(error)
        sys.exit(error.exit_code)
    except EliteError as error:
        show(error)
        state = State.inapplicable if isinstance(error, InapplicableError) else State.failed
        job = replace(job, state=state, reason=error.problem, exit_code=error.exit_code)
        return float("nan")
    except Exception as error:
        # A defect of ours: its traceback goes on to Hydra.
        job = replace(job, state=State.failed, reason=f"{type(error).__name__}: {error}", exit_code=1)
        raise
    else:
        job = replace(job, state=State.finished)
        return value
    finally:
        job.write(folder)


def at_the_edge(program: Callable[[], None]) -> None:
    """Run a `hydra.main` program and end the process: 0, an error's exit code (2 unless it says otherwise), 75 when preempted, 130 when
    interrupted."""
    # Hydra prints and swallows errors itself otherwise, with exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        program()
    except EliteError as error:
        show(error)
        sys.exit(error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        show(explain(error))
        sys.exit(ConfigError.exit_code)
    except (OSError, ValueError) as error:
        # Hydra lets these through over some overrides (executor=7, hydra.run.dir=/proc/x). Of our own program they are defects.
        if any(frame.name == as_job.__name__ for frame in traceback.extract_tb(error.__traceback__)):
            raise
        show(explain(error))
        sys.exit(ConfigError.exit_code)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command continues from the last checkpoint")
        sys.exit(130)
