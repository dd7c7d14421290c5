"""The optimizer: torch's AdamW unless an optimization puts another in its place."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from elite.config import TrainingConfig
from elite.model import apply_stage
from elite.optimizations.contract import Applied, Decision, Stage
from elite.optimizations.functions.divided import by_kind
from elite.optimizations.targets import OptimizerBuild


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    config: TrainingConfig,
    decisions: tuple[Decision, ...],
    model: Any = None,
) -> tuple[torch.optim.Optimizer, dict[str, Applied]]:
    """AdamW over `parameters` (Loshchilov & Hutter 2019), with the optimizer stage's optimizations applied.

    Weight decay spares vectors (norms, biases), as is customary.

    Args:
        learning_rate: the one in `config`, scaled for the batch.
        model: whose parameters these are, where an optimization asks for names.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.ndim > 1 else vectors).append(parameter)
    groups = [{"params": members, "weight_decay": decay} for members, decay in ((matrices, config.weight_decay), (vectors, 0.0)) if members]
    build = OptimizerBuild(groups, {"lr": learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}, model=model)
    applied = apply_stage(Stage.optimizer, decisions, build)
    factory = build.factory or torch.optim.AdamW
    groups = [{**group, "params": kind} for group in build.groups for kind in by_kind(group["params"])]
    return factory(groups, **build.arguments), applied
