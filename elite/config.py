"""The configuration: one frozen dataclass a group, the only place where a default stands.

Hydra composes YAML from `conf/` into these types, so an unknown key or a wrong type is an error before anything runs. A YAML file
states only what differs from the defaults here.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import II

from elite.ablation import AblationConfig
from elite.curriculum import CurriculumConfig
from elite.mode_options import CalibrateConfig, EvaluateConfig, LrRangeConfig, ProbeConfig
from elite.optimizations import OptimizationsConfig
from elite.retention import CheckpointConfig
from elite.scaling import LrScaling
from elite.stability import StabilityConfig
from elite.streaming import BoundaryEncoding, Keep, Place, WeightPlace
from elite.vigilance import WatchdogConfig

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
TIERS = tuple(f"tier{n}" for n in range(1, 12))
AUTO = "auto"
"""What `training.micro_batch` is until it has been found."""


class Mode(Enum):
    """What `train.py` does."""

    train = "train"
    plan = "plan"
    tiers = "tiers"
    max_context = "max_context"
    profile = "profile"
    probe = "probe"
    calibrate = "calibrate"
    optimizations = "optimizations"
    lr_range = "lr_range"
    uptrain = "uptrain"
    evaluate = "evaluate"
    interactive = "interactive"


class Unit(Enum):
    """The unit of attention: tokens attend to each other inside one, never across two."""

    repository = "repository"
    file = "file"


class FileOrder(Enum):
    """The order of a repository's files in its token stream."""

    path = "path"
    shuffled = "shuffled"


class Weights(Enum):
    """Where the base weights come from."""

    pretrained = "pretrained"
    random = "random"


class AdapterMethod(Enum):
    """What is trained: low-rank adapters on every linear map, all weights, or what a conversion has changed."""

    lora = "lora"
    full = "full"
    converted = "converted"
    """The projections that optimizations.gqa_conversion makes, everything else frozen (mode=uptrain)."""


class Schedule(Enum):
    """Shape of the learning rate over the run."""

    one_cycle = "one_cycle"
    cosine = "cosine"
    linear = "linear"
    polynomial = "polynomial"
    wsd = "wsd"
    constant = "constant"


class Executor(Enum):
    """How a forward and backward pass is carried out: ordinarily over the whole sequence, streamed, or by the fastest that fits."""

    auto = "auto"
    whole = "whole"
    streamed = "streamed"
    """Layer by layer, chunk by chunk: device memory grows with neither depth nor, beyond one layer's keys and values, context."""


class Logger(Enum):
    """Where metrics go besides `metrics.jsonl`."""

    wandb = "wandb"
    trackio = "trackio"
    none = "none"


class Cap(Enum):
    """How a larger GPU stands in for a preset: not at all, held to its usable memory, or to its dtypes and kernels as well."""

    none = "none"
    memory = "memory"
    emulate = "emulate"
    """The preset's memory, and what its compute capability lacks is not used: bf16, newer attention kernels."""


@dataclass(frozen=True)
class TierConfig:
    """How long a sequence is, and what goes with that length."""

    name: str = "auto"
    """`tier1` … `tier11`, or `auto`: the highest that fits and makes sense."""
    context: int = 4096
    """Tokens in one sequence."""
    target_length: int = 512
    """Tokens at the end of the context that validation scores and generation writes."""
    lora_rank: int = 16
    """Default rank of the adapters at this tier."""


@dataclass(frozen=True)
class HardwareConfig:
    """The machine to plan for. Rates are data-sheet figures for dense matrices with fp32 accumulation."""

    name: str = "auto"
    """A preset, `cpu`, or `auto`: what is here."""
    gpus: int = 0
    """GPUs to use; 0 takes all that are there (presets: one)."""
    memory_gib: float = 0.0
    """Memory of one GPU as the driver reports it."""
    reserve_gib: float = 0.0
    """Part of it that the display and other programs hold."""
    compute_capability: str = ""
    """Such as `8.6`."""
    matmul_tflops: float = 0.0
    """Dense bf16 rate (fp16 where the card has no bf16)."""
    bandwidth_gb_s: float = 0.0
    """Device memory bandwidth."""
    pcie_gb_s: float = 0.0
    """Host to device rate, one direction, as reached in practice."""
    link_gb_s: float = 0.0
    """Between two GPUs, one direction, by NVLink; 0 where PCIe is all they have."""
    host_ram_gib: float = 0.0
    """Host memory a machine with such a card commonly has."""
    cap: Cap = Cap.none


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and its geometry under transformers' own names, so that a plan needs neither weights nor network."""

    name: str = "phi2"
    hub: str | None = None
    """Hub id, such as `microsoft/phi-2`."""
    path: str | None = None
    """A local folder; it wins over `package` and `hub`, and its `config.json` over the geometry below."""
    package: str | None = None
    """An installed Python package that carries the weights as a GGUF file."""
    gguf_file: str | None = None
    """File name of the weights inside `path` or the package."""
    trust_remote_code: bool = False
    """Run the Python code that the model folder names; without, a folder that names any is refused."""
    weights: Weights = Weights.pretrained
    """`random` builds the exact geometry with random weights and needs no download (benchmarks, plans)."""
    model_type: str = ""
    """Architecture by transformers' name: `phi`, `llama`, `qwen2` …"""
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    vocab_size: int = 0
    max_position_embeddings: int = 0
    """Positions the model was trained on."""
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    """Rotary embedding as transformers spells it (`rope_type`, `rope_theta`, `factor` …)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of this architecture's configuration, passed on as they are."""


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained (LoRA: Hu et al. 2021)."""

    method: AdapterMethod = AdapterMethod.lora
    rank: int = II("tier.lora_rank")
    alpha: int = 32
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes sequences."""

    source: str = "repository"
    """`repository` (git), `hf` (a local datasets folder) or `jsonl`."""
    repo: str | None = None
    """A git repository, or a folder whose direct children are git repositories; unset searches here, the parent and ~/projects."""
    path: str | None = None
    """Dataset folder (`hf`) or file (`jsonl`)."""
    text_field: str = "text"
    repo_field: str = "repo"
    """Records with the same value here belong to one repository; a record without it stands alone."""
    path_field: str = "path"
    unit: Unit = Unit.repository
    order: FileOrder = FileOrder.path
    """`shuffled` draws a new order of files each epoch."""
    val_fraction: float = 0.1
    """Share of the files held out for validation, after de-duplication."""
    val_sequences: int = 16
    """Held-out targets scored at each validation."""
    max_file_bytes: int = 1_000_000
    """Larger files are skipped."""
    exclude: list[str] = field(default_factory=list)
    """Further glob patterns of paths to skip."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run. Fractions are of all steps."""

    name: Schedule = Schedule.one_cycle
    warmup_fraction: float = 0.1
    """Steps until the peak."""
    final_fraction: float = 0.0
    """Last learning rate as a share of the peak (one_cycle, cosine, polynomial, wsd)."""
    power: float = 1.0
    """Exponent of polynomial decay."""
    decay_fraction: float = 0.2
    """Steps of the closing decay of wsd (warm-up, stable, decay)."""


@dataclass(frozen=True)
class TrainingConfig:
    """The optimizer's side of the run."""

    max_steps: int | None = None
    """Optimizer steps; unset: `epochs` over the corpus."""
    epochs: float = 1.0
    global_batch_tokens: int = 65536
    """Tokens in one optimizer step over all ranks; a longer context makes it one sequence a rank."""
    micro_batch: int | str = 1
    """Sequences in one forward pass on one rank; `auto`: the most that memory holds, found before the first step."""
    learning_rate: float = 2e-4
    lr_scaling: LrScaling = LrScaling.none
    """How the learning rate follows the tokens of an optimizer step (elite/scaling.py)."""
    lr_reference_tokens: int = 65536
    """Tokens of an optimizer step for which `learning_rate` is meant as it stands."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    val_every: int = 50
    """Optimizer steps between validations; the first and the last step always have one."""
    checkpoint_every: int = 50
    """Optimizer steps between checkpoints; the last step always has one."""
    completion_tokens: int = 48
    """Tokens of a held-out file that are completed before and after training; 0 turns it off."""
    deterministic: bool = False
    """Deterministic kernels, at some cost in speed."""
    preflight: bool | None = None
    """Before the first step, measure a pass on random tokens and stop if it does not fit; unset: on a GPU."""
    mid_step_checkpoint: bool = False
    """Keep what a step has done on disk, layer by layer, and a checkpoint after each step (executor=streamed executor.boundaries=disk)."""

    @property
    def sequences(self) -> int:
        """`micro_batch` as a number; `auto` counts as one until a plan has settled it."""
        return self.micro_batch if isinstance(self.micro_batch, int) else 1

    @property
    def saves_every(self) -> int:
        """Optimizer steps between checkpoints: a step that was cut off goes on from the one before it."""
        return 1 if self.mid_step_checkpoint else self.checkpoint_every


@dataclass(frozen=True)
class ExecutorConfig:
    """How a forward and backward pass is carried out. What is unset the plan chooses; all but the name concern the streamed executor."""

    name: Executor = Executor.auto
    chunk: int | None = None
    """Most query tokens at once."""
    block: int | None = None
    """Most keys in one attention-backward call."""
    keep: Keep | None = None
    """What the forward pass leaves for the backward."""
    slots: int | None = None
    """Boundaries at once under `keep=multilevel`."""
    boundaries: Place | None = None
    """Where boundaries wait; `disk` only if asked for."""
    encoding: BoundaryEncoding = BoundaryEncoding.exact
    """`int8` and `int4` are approximate."""
    keys_values: Place | None = None
    """Where those of the layer at work and their gradients lie: `device` or `host`."""
    weights: WeightPlace | None = None
    """Where frozen weights of the decoder layers wait."""
    folder: str | None = None
    """Where boundaries on disk are kept; unset: `output.cache`. With `training.mid_step_checkpoint` a step's are in the run folder."""


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go besides `metrics.jsonl`."""

    name: Logger = Logger.wandb
    project: str = "elite"
    entity: str | None = None
    group: str | None = None
    """Jobs of one multirun share a group; unset in a single run."""


@dataclass(frozen=True)
class PlanConfig:
    """What a plan must satisfy."""

    max_step_minutes: float = 30.0
    """`tier=auto` refuses tiers whose optimizer step takes longer."""
    min_sequences: int = 20
    """`tier=auto` refuses tiers for which the corpus gives fewer training sequences."""
    headroom_fraction: float = 0.08
    """Share of usable memory that a plan leaves free for what is not modelled."""
    take_ahead: bool = True
    """Take what the plan reserves on a GPU before the first step; off, memory is taken as steps come to need it."""


@dataclass(frozen=True)
class OutputConfig:
    """Where things are written."""

    root: str = "runs"
    """Parent of run folders."""
    folder: str | None = None
    """This run's folder; unset: `<root>/<date>/<time>_<name>`."""
    cache: str = "~/.cache/elite"
    """Tokenised corpora, converted models, what was measured of this machine."""


@dataclass(frozen=True)
class RunConfig:
    """One run."""

    mode: Mode = Mode.train
    name: str | None = None
    """Name of the run; unset: model and tier."""
    seed: int = 0
    resume: str = "auto"
    """`auto` continues an interrupted run of the same configuration, `never` starts anew, a run folder continues that one."""
    tier: TierConfig = field(default_factory=TierConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizations: OptimizationsConfig = field(default_factory=OptimizationsConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    lr_range: LrRangeConfig = field(default_factory=LrRangeConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
