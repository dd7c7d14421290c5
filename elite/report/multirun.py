"""What happens around a multirun: before it, which runs an ablation is made of; after each job, the table of all; at its end, the tracker.

A Hydra callback, named in `conf/config.yaml`; nothing of it acts in a single run.
"""

import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from elite.ablation import AblationKind, variants
from elite.compose import group_of, show
from elite.config import Logger, Mode, RunConfig
from elite.errors import ConfigError, EliteError
from elite.jobs import State, read
from elite.report import comparison, sweep
from elite.schema import build


class Multirun(Callback):
    """See above. Hydra turns what a callback raises into a warning, so what must end the multirun leaves it as SystemExit."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Give the sweeper the runs of the ablation, if one was asked for."""
        try:
            kind = _plain(config).ablation.kind
            if kind is not AblationKind.none:
                names = variants(kind, _active(list(config.hydra.overrides.task)))
                with open_dict(config.hydra.sweeper):
                    config.hydra.sweeper.params = {"ablation.variant": ",".join(names)} | (config.hydra.sweeper.params or {})
        except EliteError as error:
            show(error)
            sys.exit(error.exit_code)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Write the table anew: it is there however the multirun ends."""
        if config.hydra.mode is RunMode.MULTIRUN and config.mode is Mode.train:
            folder = Path(config.hydra.runtime.output_dir).parent
            comparison.write(folder, sweep.gathered(folder))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Say where the table is, hand it to the tracker, and end with the code of a job that failed."""
        folder = Path(config.hydra.sweep.dir).absolute()
        jobs = read(folder).values()
        failed = [job for job in jobs if job.state is State.failed]
        if config.mode is Mode.train:
            from elite.console import console

            console.print(f"{len(jobs)} jobs, {len(failed)} failed; side by side in {folder / 'ablation.md'}", markup=False)
            try:
                _log(_plain(config), folder)
            except EliteError as error:
                show(error)
                sys.exit(error.exit_code)
        if failed:
            sys.exit(failed[0].exit_code)


def _plain(config: DictConfig) -> RunConfig:
    plain = deepcopy(config)
    with read_write(plain), open_dict(plain):
        del plain["hydra"]
    return build(plain)


def _active(overrides: Sequence[str]) -> list[str]:
    """Optimizations that act in any combination of what is swept besides; combinations that cannot be planned fail as jobs.

    Raises:
        EliteError: none can be planned, or their contexts would differ.
    """
    from elite import geometry, hardware
    from elite.optimizations import ALL
    from elite.plan.ablated import active_parts

    found: set[str] = set()
    errors: list[EliteError] = []
    (combinations,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(list(overrides)), None)
    for combination in combinations:
        config = build(hydra.compose("config", combination))
        if config.tier.name == "auto":
            raise ConfigError("tier=auto may choose another context for each run of an ablation", "tier=tier1 … tier11")
        try:
            device = hardware.device(config.hardware, cache=Path(config.output.cache).expanduser())
            found |= set(active_parts(config, device, geometry.shape(config.model)))
        except EliteError as error:
            errors.append(error)
    if len(errors) == len(combinations):
        raise errors[0]
    if not found:
        raise ConfigError("no optimization acts in this run: there is nothing to leave out", "optimizations=standard or extreme")
    return [kind.name for kind in ALL if kind.name in found]


def _log(config: RunConfig, folder: Path) -> None:
    """Add the table to the jobs' group, if W&B has them."""
    if config.logger.name is not Logger.wandb:
        return
    from elite.callbacks.trackers import log_table

    rows = sweep.gathered(folder)
    made = [comparison.values(row, rows) for row in rows]
    log_table(config.logger, folder, group_of(config, folder), [*made[0]], [list(line.values()) for line in made])
