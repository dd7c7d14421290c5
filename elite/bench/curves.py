"""Loss curves of the whole and the streamed executor on the same real batches: `python -m elite.bench.curves FILE [--steps N]`.

Both train the pretrained SmolLM2 from the same values on the same rows of a repository, by the program's own stream, schedule and step.
Their losses must stay as close as `Exactness.EQUAL` allows in bf16 (`EXACT` in fp32).
"""

import gc
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from elite.bench import text
from elite.bench.assemble import Assembled, assembled, described, write
from elite.config import AdapterMethod, Executor, RunConfig
from elite.console import console
from elite.data.batches import TrainStream
from elite.data.tokens import TokenStore
from elite.optimizations.contract import TOLERANCES, Exactness
from elite.runfolder import environment
from elite.training.schedules import schedule
from elite.training.step import make_scaler, optimizer_step

CHUNKS = 4
"""Of a row in the streamed executor; a plan would often take a row of this length as one."""


def compare(config: RunConfig) -> dict[str, Any]:
    """LoRA and full fine-tuning under both executors; what the file gets.

    Raises:
        PlanError: a plan does not fit.
        DataError: the repository has too little text.
    """
    store, runs = text.tokens(config), []
    for method in (AdapterMethod.lora, AdapterMethod.full):
        adapted = replace(config, adapter=replace(config.adapter, method=method))
        whole, start = trained(_under(adapted, Executor.whole), store, None)
        streamed, _ = trained(_under(adapted, Executor.streamed), store, start)
        run = {"adapter": method.value, "dtype": whole["dtype"], **differences(whole["losses"], streamed["losses"], whole["dtype"])}
        runs.append(run | {"whole": whole, "streamed": streamed})
        console.print(run, markup=False)
    return {"environment": environment(), "steps": config.training.max_steps, "learning_rate": config.training.learning_rate, "runs": runs}


def differences(whole: list[float], streamed: list[float], dtype: str) -> dict[str, Any]:
    """How far two curves are apart: the largest |Δloss| and the mean of Δloss over the steps, in nats, against those
    of `EXACT` in fp32, of `EQUAL` otherwise."""
    apart = [b - a for a, b in zip(whole, streamed, strict=True)]
    largest, drift = max(map(abs, apart)), abs(sum(apart) / len(apart))
    limit = TOLERANCES[Exactness.EXACT if dtype == "float32" else Exactness.EQUAL]
    return {
        "max_difference": largest,
        "mean_drift": drift,
        "limits": {"max_difference": limit.largest, "mean_drift": limit.drift},
        "within": largest <= limit.largest and drift <= limit.drift,
    }


def _under(config: RunConfig, executor: Executor) -> RunConfig:
    return replace(config, executor=replace(config.executor, name=executor, chunk=config.tier.context // CHUNKS))


def trained(config: RunConfig, store: TokenStore, start: list[Tensor] | None) -> tuple[dict[str, Any], list[Tensor]]:
    """One run's description and losses, and the values that training began with.

    Args:
        start: values to begin with; unset: as the seed draws them. Fresh adapters are drawn where the weights lie, host or device, so
            one seed need not mean one beginning.
    """
    with assembled(config) as made:
        trainable = made.loaded.trainable
        for parameter, value in zip(trainable, start or (), strict=start is not None):
            parameter.data.copy_(value)
        began = [parameter.detach().cpu().clone() for parameter in trainable]
        losses = _losses(made, store)
        run = {**described(made), "dtype": str(made.dtype).removeprefix("torch."), "losses": losses}
    del made, trainable
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return run, began


def _losses(made: Assembled, store: TokenStore) -> list[float]:
    """Train to the last step; the loss of each."""
    config, plan, ranks = made.config, made.plan, made.ranks
    stream = TrainStream(store, config.data, plan.context, plan.micro_batch, config.seed, packed=True)
    scheduler, scaler = schedule(made.optimizer, config.schedule, plan.steps), make_scaler(ranks.device, made.dtype)
    losses = []
    for step in range(plan.steps):
        window, norm = stream.next_window(plan.accumulation), config.training.max_grad_norm
        done = optimizer_step(made.executors.training, made.optimizer, scaler, window, made.loaded.trainable, norm, ranks)
        losses.append(done.loss)
        if step + 1 < plan.steps:
            scheduler.step()
    return losses


def main() -> None:
    """The command."""
    options = text.options(__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=50)
    arguments = options.parse_args()
    mixed = str(arguments.dtype != "float32").lower()
    overrides = f"training.max_steps={arguments.steps}", f"optimizations.mixed_precision.enabled={mixed}"
    write(arguments.file, compare(text.request(arguments, *overrides)))


if __name__ == "__main__":
    main()
