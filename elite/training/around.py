"""What acts around steps: the optimizations of stage `loop`, for runs and for benches alike."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from elite.config import RunConfig
from elite.data.batches import Batch
from elite.distributed.ranks import Ranks
from elite.executor.contract import Executor
from elite.model import apply_stage
from elite.optimizations.contract import Applied, Decision, Site, Stage
from elite.optimizations.hooks import Hook
from elite.optimizations.memory_pool import given, grow
from elite.optimizations.targets import LoopBuild
from elite.plan.traffic import active
from elite.training.ahead import Ahead, Taking
from elite.training.step import Accumulate, StepResult, accumulate, optimizer_step


def loop_hooks(
    config: RunConfig,
    decisions: tuple[Decision, ...],
    executor: Executor,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    steps: int,
    device: torch.device,
    taking: Taking,
    rehearse: Callable[[], float],
) -> tuple[list[Hook], dict[str, Applied]]:
    """What the active parts add to a loop of so many steps.

    Args:
        taking: what memory to take before the first step.
        rehearse: as in `LoopBuild`.
    """
    every = config.training.val_every
    build = LoopBuild(
        executor=executor,
        optimizer=optimizer,
        parameters=parameters,
        steps=steps,
        validations=len({*range(every, steps, every), steps}),
        seed=config.seed,
        device=device,
        rehearse=rehearse,
    )
    applied = apply_stage(Stage.loop, decisions, build)
    # First: what others begin with is cut from it.
    ahead = [Ahead(taking, optimizer, parameters, device)] if taking.reserved_bytes else []
    if ahead and device.type == "cuda" and given() is None and not active(decisions, Site.ALLOCATOR):
        applied[Ahead.name] = Applied(1, "allocator", grow())
    return [*ahead, *build.hooks], applied


def hooked_step(
    number: int,
    hooks: Sequence[Hook],
    executor: Executor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    window: Sequence[Batch],
    parameters: list[nn.Parameter],
    max_grad_norm: float,
    ranks: Ranks,
    gradients: Accumulate = accumulate,
) -> StepResult:
    """Step `number` (from 1) as `optimizer_step` takes it, with hooks around it; there is no schedule."""

    def of_hooks() -> None:
        for hook in hooks:
            hook.gradients(parameters, number)

    result = optimizer_step(executor, optimizer, scaler, window, parameters, max_grad_norm, ranks, of_hooks, gradients=gradients)
    for hook in hooks:
        hook.stepped(number)
    return result
