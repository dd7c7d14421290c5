"""What an ablation can show on a model and machine: the optimizations that act there."""

from dataclasses import replace

from elite.ablation import AblationKind, part_of
from elite.config import RunConfig
from elite.errors import ConfigError, InapplicableError
from elite.facts import NO_CORPUS, Device, ModelShape
from elite.plan.plan import Switch, make_plan


def active_parts(config: RunConfig, device: Device, shape: ModelShape) -> list[str]:
    """The optimizations that act in this run, in order of action.

    Raises:
        PlanError: two that were requested exclude each other.
    """
    return [switch.name for switch in _switches(config, device, shape) if switch.active]


def require_variation(config: RunConfig, device: Device, shape: ModelShape) -> None:
    """Refuse a run of an ablation that would be its baseline under another name.

    Raises:
        ConfigError: the runs of an ablation were asked for, and this is none of them.
        InapplicableError: what it leaves out, or has alone, does not act here.
    """
    ablation = config.ablation
    if ablation.variant is None and ablation.kind is not AblationKind.none:
        raise ConfigError(
            f"ablation.kind={ablation.kind.value} compares several runs, and this is one", "python train.py -m … , or ablation.variant=all"
        )
    part = part_of(ablation.variant)
    if part is None:
        return
    with_it = replace(config, optimizations=config.optimizations.switched({part: True}))
    (switch,) = (switch for switch in _switches(with_it, device, shape) if switch.name == part)
    if not switch.active:
        raise InapplicableError(f"ablation.variant={ablation.variant}: {part} does not act here, {switch.reason}")


def _switches(config: RunConfig, device: Device, shape: ModelShape) -> tuple[Switch, ...]:
    return make_plan(config, device, shape, NO_CORPUS).decisions
