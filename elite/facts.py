"""What a plan knows before anything is allocated: plain numbers, units in the names, no torch.

Optimizations read these to say whether they can act and what they save; the planner fills them in.
"""

from dataclasses import dataclass, field

GIB = 1024**3
FORMULA_GELU = frozenset({"phi"})
"""Architectures whose GELU is a chain of elementary operations (`gelu_new`), each of which keeps what its backward reads."""


@dataclass(frozen=True)
class LinearShape:
    """One linear map of a decoder layer: `name` as in the layer (`self_attn.q_proj`), weight of shape [outputs, inputs]."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    trained: bool = False
    """Its own weights are trained while others are frozen (`adapter.method=converted`)."""

    @property
    def params(self) -> int:
        """Weights and biases."""
        return (self.inputs + self.bias) * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """A causal language model as the arithmetic sees it. Parameter counts are exact: read off the model built without memory."""

    name: str
    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    layer_linears: tuple[LinearShape, ...]
    layer_params: int
    """Parameters of one decoder layer."""
    total_params: int
    """All parameters, a tied head counted once."""
    sliding_window: int | None = None
    """Keys that a query of a windowed layer sees; None if every layer sees all."""
    windowed_layers: int = 0
    """Layers with that window."""
    rotary_dim: int = 0
    """Values of a head that rotary embedding turns."""
    residual_dropout: bool = False
    """What attention and MLP add to the residual stream passes a dropout first (Phi-2 trains with one)."""
    unstreamable: str = ""
    """Why the streamed executor cannot carry this model; empty if it can."""
    loaded: "ModelShape | None" = None
    """The shape in which the weights are loaded, where an optimization makes another of it."""
    tensor_plan: tuple[tuple[str, str], ...] = ()
    """How transformers would divide a layer among ranks (`base_model_tp_plan`): modules, named as in the layer, and their styles."""

    @property
    def as_loaded(self) -> "ModelShape":
        """The shape before optimizations changed it."""
        return self.loaded or self

    @property
    def linear_params(self) -> int:
        """Weights of all decoder layers' linear maps: what LoRA attaches to and NF4 packs."""
        return self.num_hidden_layers * sum(linear.inputs * linear.outputs for linear in self.layer_linears)

    def keys_seen(self, context: int) -> float:
        """Keys that a query sees, on average over a sequence of `context` tokens and over the layers."""
        window = min(context, self.sliding_window or context)
        share = self.windowed_layers / self.num_hidden_layers
        return share * (window - window**2 / (2 * context)) + (1 - share) * context / 2

    @property
    def trained_linear_params(self) -> int:
        """Weights and biases of the linear maps that are trained while others are frozen."""
        return self.num_hidden_layers * sum(linear.params for linear in self.layer_linears if linear.trained)

    @property
    def embedding_params(self) -> int:
        """Weights of the embedding, and as many of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.total_params - self.num_hidden_layers * self.layer_params < 2 * self.embedding_params

    def lora_params(self, rank: int) -> int:
        """Trainable parameters of rank-`rank` adapters on every linear map of every decoder layer (Hu et al. 2021: r(in + out) each)."""
        return self.num_hidden_layers * sum(rank * (linear.inputs + linear.outputs) for linear in self.layer_linears)


@dataclass(frozen=True)
class AttentionRates:
    """What one attention kernel reaches on long rows; FLOP/s. A pair of query and key counts 4·D forward and 10·D backward a head."""

    forward: float
    backward: float
    forward_half: float
    """Tokens of a causal square at which the forward rate is half of that."""
    backward_half: float


@dataclass(frozen=True)
class Rates:
    """What a machine sustains, under the load of training."""

    matmul_flops_per_s: float
    """Matrix products of real layers' sizes in the compute dtype."""
    fp32_flops_per_s: float
    attention: dict[int, AttentionRates]
    """By head dimension."""
    memory_bytes_per_s: float
    """A copy on the device, what is read and what is written counted."""
    to_device_bytes_per_s: float
    to_host_bytes_per_s: float
    """Pinned host memory, both directions at work."""
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    operation_s: float
    """Host time of one ordinary eager operation that is differentiated."""
    origin: str
    """Where these come from, in words."""


@dataclass(frozen=True)
class Device:
    """The machine a run is planned for. `present` is False for a preset that is planned without the card."""

    name: str
    kind: str
    """`cuda` or `cpu`."""
    present: bool
    count: int
    memory_total_bytes: int
    memory_usable_bytes: int
    """What a run may take: total less the CUDA context and a display reserve; on a CPU, free host memory."""
    compute_capability: tuple[int, int] | None
    supports_bf16: bool
    matmul_flops_per_s: float
    """Dense rate in the compute dtype with fp32 accumulation, as the data sheet has it."""
    memory_bytes_per_s: float
    host_link_bytes_per_s: float
    """Pinned host memory to device, one direction, as reached in practice."""
    host_ram_bytes: int
    cores: int
    capped: bool = False
    """The process is held to `memory_usable_bytes` on a larger card."""
    disk_free_bytes: int = 0
    """Free on the disk of the cache folder; 0 where unknown."""
    link_bytes_per_s: float = 0.0
    """Between two GPUs, one direction, as the data sheet has it; 0 where they have no link but the host's."""
    measured: Rates | None = None
    """What the stress test found here; None without one, or for a card that is not here."""


@dataclass(frozen=True)
class Corpus:
    """What the data source holds after filtering, de-duplication and the validation split."""

    origin: str
    train_files: int
    val_files: int
    train_tokens: int
    val_tokens: int
    bytes: int
    count_method: str
    """`exact`, or how the token counts were estimated."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Files left out, by reason."""


NO_CORPUS = Corpus("random tokens", 0, 0, 0, 0, 0, "exact")
"""For plans of a model and a machine alone."""


@dataclass(frozen=True)
class Facts:
    """Everything an optimization may ask before the run exists."""

    model: ModelShape
    device: Device
    context: int
    """Tokens in one sequence."""
    micro_batch: int
    """Sequences in one forward pass."""
    trainable_params: int
    adapter: str
    """`lora`, `full` or `converted`."""
    executor: str = "whole"
    """`whole` or `streamed`."""
    accumulation: int = 1
    """Forward and backward passes of one optimizer step."""
    host_weights: bool = False
    """Frozen weights of the layers are to wait whole in host memory (executor.weights=streamed)."""
    journal: bool = False
    """Progress within a step is kept (training.mid_step_checkpoint)."""
    generates: bool = True
    """Text is generated: a completion to look at, or an evaluation."""
    sharing: int = 1
    """Ranks that share each sequence; 1: none is shared."""
    dividing: int = 1
    """Ranks that divide each layer and carry the same sequences; `model` is then what one of them has. 1: each has all of it."""

    @property
    def micro_tokens(self) -> int:
        """Tokens in one forward pass of one rank."""
        return self.context * self.micro_batch // self.sharing
