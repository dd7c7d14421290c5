"""Every optimization, in the order in which they act, and the rules that hold between them."""

from dataclasses import dataclass, field

from elite.errors import PlanError
from elite.facts import Facts
from elite.optimizations.adamw_8bit import AdamW8bit
from elite.optimizations.contract import Decision, Optimization, OptimizationConfig, Site
from elite.optimizations.flash_attention import FlashAttention
from elite.optimizations.gradient_checkpointing import GradientCheckpointing
from elite.optimizations.mixed_precision import MixedPrecision
from elite.optimizations.qlora import QLoRA
from elite.optimizations.sequence_packing import SequencePacking

ALL: tuple[type[Optimization], ...] = (
    SequencePacking,  # decides what a batch is, before any model exists
    MixedPrecision,  # decides the dtype in which weights are loaded
    QLoRA,  # replaces linear maps, so before adapters attach to them
    FlashAttention,  # chooses a function by name; any time after loading
    GradientCheckpointing,  # wraps whole layers, adapters included
    AdamW8bit,  # needs the trainable parameters, so last
)


@dataclass(frozen=True)
class OptimizationsConfig:
    """One switch each; presets turn several on, `optimizations.NAME.enabled=` overrides."""

    preset: str = "none"
    sequence_packing: OptimizationConfig = field(default_factory=SequencePacking.Config)
    mixed_precision: OptimizationConfig = field(default_factory=MixedPrecision.Config)
    qlora: OptimizationConfig = field(default_factory=QLoRA.Config)
    flash_attention: OptimizationConfig = field(default_factory=FlashAttention.Config)
    gradient_checkpointing: OptimizationConfig = field(default_factory=GradientCheckpointing.Config)
    adamw_8bit: OptimizationConfig = field(default_factory=AdamW8bit.Config)


def decide(config: OptimizationsConfig, facts: Facts) -> tuple[Decision, ...]:
    """What becomes of every optimization in this run, in order of action.

    Raises:
        PlanError: two requested optimizations claim one site.
    """
    decisions = []
    owners: dict[Site, Optimization] = {}
    for kind in ALL:
        options: OptimizationConfig = getattr(config, kind.name)
        optimization = kind(options)
        reason = optimization.check(facts) if options.enabled else None
        active = options.enabled and reason is None
        decisions.append(Decision(optimization, options.enabled, active, reason or ""))
        for site in kind.claims if active else ():
            if site in owners:
                raise PlanError(
                    f"optimizations.{kind.name} and optimizations.{owners[site].name} both decide the {site.value}",
                    f"turn one off: optimizations.{kind.name}.enabled=false",
                )
            owners[site] = optimization
    return tuple(decisions)
