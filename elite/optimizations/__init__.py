"""Every optimization, in the order in which they act, and the rules that hold between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from elite.errors import PlanError
from elite.facts import Facts, ModelShape
from elite.optimizations.activation_quantization import ActivationQuantization
from elite.optimizations.adamw_8bit import AdamW8bit
from elite.optimizations.adaptive_gradient_clipping import AdaptiveGradientClipping
from elite.optimizations.backend_flags import BackendFlags
from elite.optimizations.checkpoint_offload import CheckpointOffload
from elite.optimizations.contract import STREAMED_SITES, UNDIVIDED_SITES, Decision, Optimization, OptimizationConfig, Site
from elite.optimizations.defragmentation import Defragmentation
from elite.optimizations.early_stopping import EarlyStopping
from elite.optimizations.ema import EMA
from elite.optimizations.flash_attention import FlashAttention
from elite.optimizations.fused_kernels import FusedKernels
from elite.optimizations.fused_lora import FusedLoRA
from elite.optimizations.fused_loss import FusedLoss
from elite.optimizations.gqa_conversion import GQAConversion
from elite.optimizations.gradient_centralization import GradientCentralization
from elite.optimizations.gradient_checkpointing import GradientCheckpointing
from elite.optimizations.gradient_noise import GradientNoise
from elite.optimizations.kernel_warmup import KernelWarmup
from elite.optimizations.label_smoothing import LabelSmoothing
from elite.optimizations.liger_kernels import LigerKernels
from elite.optimizations.lookahead import Lookahead
from elite.optimizations.lora_plus import LoRAPlus
from elite.optimizations.loss_spike_detection import LossSpikeDetection
from elite.optimizations.memory_mapped_data import MemoryMappedData
from elite.optimizations.memory_pool import MemoryPool
from elite.optimizations.mixed_precision import MixedPrecision
from elite.optimizations.paged_attention import PagedAttention
from elite.optimizations.power_sgd import PowerSGD
from elite.optimizations.qlora import QLoRA
from elite.optimizations.ring_attention import RingAttention
from elite.optimizations.sequence_packing import SequencePacking
from elite.optimizations.sliding_window import SlidingWindow
from elite.optimizations.swa import SWA
from elite.optimizations.tensor_parallel import TensorParallel
from elite.optimizations.tiled_mlp import TiledMLP
from elite.optimizations.torch_compile import TorchCompile
from elite.optimizations.zero_2 import ZeRO2
from elite.optimizations.zero_3 import ZeRO3

ALL: tuple[type[Optimization], ...] = (
    SequencePacking,  # decides what a batch is, before any model exists
    MemoryMappedData,  # how tokens are reached; no other part asks
    MemoryPool,  # before anything is on the device
    BackendFlags,  # before anything is computed
    MixedPrecision,  # decides the dtype in which weights are loaded
    GQAConversion,  # makes another model of the one that was loaded, so before anything stands in for its modules
    SlidingWindow,  # likewise: what the layers' attention sees
    QLoRA,  # replaces linear maps, so before adapters attach to them
    FlashAttention,  # chooses a function by name; any time after loading
    RingAttention,  # the same function for rows that are not shared, so its memory stands above that one's
    TensorParallel,  # divides linear maps as they were loaded, before what is put in their modules' place is tried out
    FusedKernels,  # replaces norms and MLPs as they were loaded, before anything wraps them
    LigerKernels,  # the same places; patches them by its own rules
    FusedLoRA,  # acts on adapters, inside what checkpointing wraps
    TiledMLP,  # wraps MLPs with their adapters, inside the layers that checkpointing wraps
    TorchCompile,  # traces layers with all that stands in for their modules, inside what checkpointing repeats
    GradientCheckpointing,  # wraps whole layers, adapters included
    CheckpointOffload,  # the same place, when inputs wait in host memory
    ActivationQuantization,  # around checkpointed layers, whose inputs are what they save
    FusedLoss,  # replaces the whole model's forward, so after every part of it; its proof runs the model as it then is
    LoRAPlus,  # divides what is trained into groups, whichever optimizer takes them
    AdamW8bit,  # the optimizer, of the groups as they then are
    ZeRO2,  # divides the optimizer's state, whatever that has become
    ZeRO3,  # the same, and weights
    PowerSGD,  # how gradients come to be whole, before anything acts on them
    KernelWarmup,  # before the first step, with everything of the model in place
    LabelSmoothing,  # what a step's loss is
    GradientCentralization,  # gradients as they come
    AdaptiveGradientClipping,  # of what will be used of them
    GradientNoise,  # on top, so that no unit's clipping takes it away
    LossSpikeDetection,  # judges a step by its loss, before its update
    Lookahead,  # settles a step's weights before anything averages them
    EMA,  # averages of settled weights
    SWA,  # the same place
    EarlyStopping,  # judges what the averages' validation says
    Defragmentation,  # when all of a step is done
    PagedAttention,  # generates with what was trained
)


@dataclass(frozen=True)
class OptimizationsConfig:
    """One switch each; presets turn several on, `optimizations.NAME.enabled=` overrides."""

    preset: str = "none"
    sequence_packing: OptimizationConfig = field(default_factory=SequencePacking.Config)
    memory_mapped_data: OptimizationConfig = field(default_factory=MemoryMappedData.Config)
    memory_pool: OptimizationConfig = field(default_factory=MemoryPool.Config)
    backend_flags: OptimizationConfig = field(default_factory=BackendFlags.Config)
    mixed_precision: OptimizationConfig = field(default_factory=MixedPrecision.Config)
    gqa_conversion: OptimizationConfig = field(default_factory=GQAConversion.Config)
    sliding_window: OptimizationConfig = field(default_factory=SlidingWindow.Config)
    qlora: OptimizationConfig = field(default_factory=QLoRA.Config)
    flash_attention: OptimizationConfig = field(default_factory=FlashAttention.Config)
    ring_attention: OptimizationConfig = field(default_factory=RingAttention.Config)
    tensor_parallel: OptimizationConfig = field(default_factory=TensorParallel.Config)
    fused_kernels: OptimizationConfig = field(default_factory=FusedKernels.Config)
    liger_kernels: OptimizationConfig = field(default_factory=LigerKernels.Config)
    fused_lora: OptimizationConfig = field(default_factory=FusedLoRA.Config)
    tiled_mlp: OptimizationConfig = field(default_factory=TiledMLP.Config)
    torch_compile: OptimizationConfig = field(default_factory=TorchCompile.Config)
    gradient_checkpointing: OptimizationConfig = field(default_factory=GradientCheckpointing.Config)
    checkpoint_offload: OptimizationConfig = field(default_factory=CheckpointOffload.Config)
    activation_quantization: OptimizationConfig = field(default_factory=ActivationQuantization.Config)
    fused_loss: OptimizationConfig = field(default_factory=FusedLoss.Config)
    lora_plus: OptimizationConfig = field(default_factory=LoRAPlus.Config)
    adamw_8bit: OptimizationConfig = field(default_factory=AdamW8bit.Config)
    zero_2: OptimizationConfig = field(default_factory=ZeRO2.Config)
    zero_3: OptimizationConfig = field(default_factory=ZeRO3.Config)
    power_sgd: OptimizationConfig = field(default_factory=PowerSGD.Config)
    kernel_warmup: OptimizationConfig = field(default_factory=KernelWarmup.Config)
    label_smoothing: OptimizationConfig = field(default_factory=LabelSmoothing.Config)
    gradient_centralization: OptimizationConfig = field(default_factory=GradientCentralization.Config)
    adaptive_gradient_clipping: OptimizationConfig = field(default_factory=AdaptiveGradientClipping.Config)
    gradient_noise: OptimizationConfig = field(default_factory=GradientNoise.Config)
    loss_spike_detection: OptimizationConfig = field(default_factory=LossSpikeDetection.Config)
    lookahead: OptimizationConfig = field(default_factory=Lookahead.Config)
    ema: OptimizationConfig = field(default_factory=EMA.Config)
    swa: OptimizationConfig = field(default_factory=SWA.Config)
    early_stopping: OptimizationConfig = field(default_factory=EarlyStopping.Config)
    defragmentation: OptimizationConfig = field(default_factory=Defragmentation.Config)
    paged_attention: OptimizationConfig = field(default_factory=PagedAttention.Config)

    def switched(self, states: Mapping[str, bool]) -> "OptimizationsConfig":
        """The same options with these parts on or off."""
        return replace(self, **{name: replace(getattr(self, name), enabled=on) for name, on in states.items()})


def reshaped(config: OptimizationsConfig, shape: ModelShape) -> ModelShape:
    """The shape of the model that is trained: what enabled optimizations make of the one that is loaded.

    Raises:
        PlanError: one of them cannot be carried out as asked.
    """
    made = shape.as_loaded
    for kind in ALL:
        options: OptimizationConfig = getattr(config, kind.name)
        made = kind(options).reshaped(made) if options.enabled else made
    return made if made == shape.as_loaded else replace(made, loaded=shape.as_loaded)


def decide(config: OptimizationsConfig, facts: Facts) -> tuple[Decision, ...]:
    """What becomes of every optimization in this run, in order of action.

    Raises:
        PlanError: two requested optimizations claim one site, or one excludes another.
    """
    decisions = []
    owners: dict[Site, Optimization] = {}
    for kind in ALL:
        options: OptimizationConfig = getattr(config, kind.name)
        optimization = kind(options)
        reason = _inactive(optimization, facts) if options.enabled else None
        active = options.enabled and reason is None
        decisions.append(Decision(optimization, options.enabled, active, reason or ""))
        for site in kind.claims if active else ():
            if site in owners:
                raise PlanError(
                    f"optimizations.{kind.name} and optimizations.{owners[site].name} both decide {site.words}",
                    f"turn one off: optimizations.{kind.name}.enabled=false",
                )
            owners[site] = optimization
    for decision in decisions:
        for site, reason in decision.optimization.excludes.items() if decision.active else ():
            if site in owners:
                raise PlanError(
                    f"optimizations.{owners[site].name} does not go with optimizations.{decision.name}: {reason}",
                    f"turn one off: optimizations.{owners[site].name}.enabled=false",
                )
    return tuple(decisions)


def _inactive(optimization: Optimization, facts: Facts) -> str | None:
    """Why a requested optimization does not act, or None if it does."""
    taken = optimization.claims & STREAMED_SITES if facts.executor == "streamed" else None
    if taken:
        return f"the streamed executor does this itself ({', '.join(sorted(site.value for site in taken))})"
    apart = optimization.claims & UNDIVIDED_SITES if facts.dividing > 1 else None
    if apart:
        return f"ranks divide each layer (optimizations.{TensorParallel.name}), and this acts on whole tensors"
    return optimization.check(facts)
