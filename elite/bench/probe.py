"""`mode=probe`: what a streamed step of this configuration really takes, found by running a small part of it.

`probe.steps` adds whole optimizer steps, to hold the estimate against. The result goes to the terminal and, as JSON, to `probe.file`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from elite.bench.assemble import Assembled, assembled, described, peaks, reset_peak, write
from elite.config import Executor, RunConfig
from elite.console import console
from elite.executor.streamed.probe import Probe
from elite.plan.words import duration, gib
from elite.runfolder import environment


def probe(config: RunConfig) -> dict[str, Any]:
    """Probe this configuration under the streamed executor; returns what `probe.file` gets.

    Raises:
        PlanError: the plan does not fit.
    """
    streamed = dataclasses.replace(config, executor=dataclasses.replace(config.executor, name=Executor.streamed))
    with assembled(streamed) as made:
        result = {"environment": environment(), **described(made), "probe": _probed(made)}
        result["steps"] = [made.step() for _ in range(config.probe.steps)]
    _show(result)
    if config.probe.file is not None:
        write(Path(config.probe.file), result)
    return result


def _probed(made: Assembled) -> dict[str, Any]:
    assert made.executors.attached is not None
    runner, device = made.executors.attached.runner, made.ranks.device
    for parameter in made.loaded.trainable:
        # A step of nothing: gradients and the optimizer's state have their place before the peak is measured.
        parameter.grad = torch.zeros_like(parameter)
    made.optimizer.step()
    if device.type == "cuda":
        # What loading left behind would count as reserved.
        torch.cuda.empty_cache()
    reset_peak(device)
    with torch.autocast(device.type, dtype=made.dtype, enabled=made.dtype != torch.float32):
        estimate = Probe(runner, made.plan.context * made.plan.micro_batch, made.vocab).run()
    made.optimizer.zero_grad(set_to_none=True)
    figures = dataclasses.asdict(estimate) | {"step_s": estimate.step_s, "host_pinned_bytes": runner.host_bytes()}
    return figures | peaks(device)


def _show(result: dict[str, Any]) -> None:
    layout, found = result["layout"], result["probe"]
    chosen = ", ".join(f"{name} {value}" for name, value in layout.items() if value is not None)
    console.print(f"{result['context']:,} tokens, {found['chunks']} chunks; {chosen}")
    planned = result["planned"]
    console.print(f"{'plan':8} {duration(planned['step_s'])}, peak {gib(planned['device_bytes'])}, host {gib(planned['host_bytes'])}")
    kinds = ("allocated", "reserved", "host_rss")
    for name, line in [("probe", found), *[(f"step {i + 1}", step) for i, step in enumerate(result["steps"])]]:
        highest = [f"{kind} {gib(line[f'{kind}_peak_bytes'])}" for kind in kinds if f"{kind}_peak_bytes" in line]
        console.print(f"{name:8} {duration(line['step_s'])}, peak {', '.join(highest)}")
