"""What every optimization declares, and what the planner and the run do with it.

An optimization is one file: its docstring (What, How, Memory, Source), a frozen `Config`, and a subclass of `Optimization`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar

from elite.facts import Facts, ModelShape
from elite.optimizations.parts import FP32, PLAIN, LayerForm, Sizes


class Stage(Enum):
    """When an optimization acts; `apply` is handed that stage's target (types in `targets.py`)."""

    data = "data"
    """A `BatchLayout`, before sequences are packed."""
    runtime = "runtime"
    """A `Runtime`, before the model is loaded."""
    geometry = "geometry"
    """The model as loaded, before modules are replaced: what acts here makes another model of it."""
    model = "model"
    """The loaded model, before adapters are attached."""
    executor = "executor"
    """The model with its adapters."""
    optimizer = "optimizer"
    """An `OptimizerBuild`, before the optimizer exists."""
    loop = "loop"
    """A `LoopBuild`, before the first step."""
    generation = "generation"
    """A `GenerationBuild`, before text is generated."""


class Exactness(Enum):
    """How far a result may differ from the same run without the optimization (a test holds each to it)."""

    EXACT = "EXACT"
    """The same sums, possibly in another order: fp32 max |Δloss| ≤ 1e-3, mean drift ≤ 1e-5 over 50 steps."""
    EQUAL = "EQUAL"
    """The same mathematics, other rounding: bf16 max |Δloss| ≤ 1.5e-2, mean drift ≤ 1e-3 over 50 steps."""
    APPROX = "APPROX"
    """Other mathematics: the effect on validation loss is measured and printed."""


@dataclass(frozen=True)
class Tolerance:
    """How far training losses may lie from those without the optimization, step by step."""

    largest: float
    drift: float
    """Of the mean over 50 steps."""


TOLERANCES = {Exactness.EXACT: Tolerance(1e-3, 1e-5), Exactness.EQUAL: Tolerance(1.5e-2, 1e-3)}
"""In fp32 and in bf16."""


QUESTIONS = ("how", "where", "which", "what", "who", "when")


class Site(Enum):
    """A place in the run that one optimization at most may occupy."""

    BATCH_LAYOUT = "how documents share a sequence"
    CORPUS = "where the tokenised corpus is read"
    COMPUTE_DTYPE = "dtype of computation"
    BACKEND_FLAGS = "precision and algorithms of backends"
    ALLOCATOR = "how device memory is taken"
    SEQUENCE = "which ranks hold a sequence"
    LAYER_SHARES = "which ranks hold a layer"
    KV_HEADS = "number of key/value heads"
    BASE_WEIGHTS = "storage of frozen weights"
    ATTENTION_REACH = "how far back attention sees"
    ATTENTION = "attention kernel"
    ELEMENTWISE = "kernels of norms, rotary embeddings and gates"
    LORA_FORWARD = "forward pass of adapted linear maps"
    MLP_FORWARD = "forward pass of the MLPs"
    LAYER_ACTIVATIONS = "what a layer keeps for its backward"
    SAVED_TENSORS = "where and how saved tensors wait for the backward"
    COMPILATION = "who runs a layer's operations"
    LOSS = "head and loss"
    OPTIMIZER_STATE = "storage of optimizer state"
    PARAMETER_GROUPS = "learning rates of the parameters"
    GRADIENT_EXCHANGE = "how ranks exchange gradients"
    FIRST_PASS = "what runs before the first step"
    LOSS_TARGETS = "what the loss asks for"
    GRADIENT_MEAN = "mean of a unit's gradient"
    UNIT_GRADIENT_NORM = "length of a unit's gradient"
    GRADIENT_NOISE = "noise on gradients"
    SLOW_WEIGHTS = "weights that steps depart from and return to"
    EVALUATED_WEIGHTS = "weights that are validated and exported"
    LAST_STEP = "when the run ends"
    STEP_TAKEN = "which losses are too high for a step"
    ALLOCATOR_CACHE = "what the allocator keeps between steps"
    GENERATION_CACHE = "keys and values while text is generated"

    @property
    def words(self) -> str:
        """As the object of a sentence."""
        return self.value if self.value.startswith(QUESTIONS) else f"the {self.value}"


STREAMED_SITES = frozenset({Site.ATTENTION, Site.MLP_FORWARD, Site.LAYER_ACTIVATIONS, Site.LOSS})
"""Places that the streamed executor occupies itself."""

UNDIVIDED_SITES = frozenset(
    {
        *(Site.LORA_FORWARD, Site.COMPILATION, Site.SAVED_TENSORS, Site.OPTIMIZER_STATE, Site.GRADIENT_EXCHANGE, Site.GENERATION_CACHE),
        *(Site.GRADIENT_MEAN, Site.UNIT_GRADIENT_NORM, Site.GRADIENT_NOISE, Site.SLOW_WEIGHTS, Site.EVALUATED_WEIGHTS),
    }
)
"""Places whose parts work on whole tensors, of which a rank that divides layers with others has a part."""


@dataclass(frozen=True)
class Estimate:
    """Device memory at one moment of a step, by component, in bytes."""

    linear_weights: float = 0.0
    """Weights of the decoder layers' linear maps."""
    other_weights: float = 0.0
    """Embedding, head, norms, biases."""
    trainable_copy: float = 0.0
    """Adapters, which exist beside the weights (full fine-tuning trains the weights themselves), copies in the compute dtype, averages."""
    gradients: float = 0.0
    optimizer_state: float = 0.0
    optimizer_workspace: float = 0.0
    """What the optimizer needs during its step."""
    saved_activations: float = 0.0
    """What decoder layers keep from forward to backward; one layer's where layers are recomputed."""
    layer_inputs: float = 0.0
    """Inputs of layers that are recomputed from them."""
    attention_scores: float = 0.0
    """Attention matrices [heads, S, S] where the kernel forms them."""
    layer_workspace: float = 0.0
    """Gradients and transient tensors of the norm or attention at work."""
    mlp_workspace: float = 0.0
    """The same of an MLP."""
    loss_workspace: float = 0.0
    """The last hidden state, logits, what is made of them and their gradients."""
    keys_values: float = 0.0
    """Keys, values and their gradients of the layer at work, under the streamed executor."""
    attention_workspace: float = 0.0
    """Gradients of one block of keys and values, expanded to all query heads, under the streamed executor."""
    staging: float = 0.0
    """Buffers of copies under way, under the streamed executor; on a CPU everything that waits in host memory."""
    batch: float = 0.0
    """Token ids, positions, labels and the angles of the positions."""
    runtime: float = 0.0
    """Library workspaces (matrix products, attention)."""

    @property
    def total(self) -> float:
        """Sum of all components, in bytes."""
        return sum(vars(self).values())

    def by_component(self) -> dict[str, float]:
        """Bytes by component name, in declaration order."""
        return dict(vars(self))


LEAVING = 2
"""As how many tensors a gradient exists while ranks exchange it, where that is as soon as it has been made: itself and a copy."""
FP64 = 8
NORM_VALUES = 250_000_000
"""Of a part that leaves for host memory, in fp64 at once for its norm (DeepSpeed 0.19, `_constant_buffered_norm2`)."""


@dataclass(frozen=True)
class Step:
    """What a step is made of, as far as memory goes. Starts with everything off; each active optimization maps it to a new one."""

    standing: Estimate
    """What is there all the time: weights, gradients, the optimizer's state."""
    value: int = FP32
    """Bytes of a value of the compute dtype."""
    hidden: int = FP32
    """Bytes of a value of a hidden state."""
    form: LayerForm = PLAIN
    recomputed: bool = False
    """Layers keep their input alone and are computed again."""
    inputs_at_once: int | None = None
    """Layers' inputs on the device at once; None is all of them."""
    packed_bits: float | None = None
    """Bits of a value that a layer keeps, where it is packed."""
    packing: int = 0
    """Bytes of scratch a value while a tensor is packed or unpacked."""
    loss_tile: int | None = None
    """Tokens whose logits exist at once, with their gradients formed in the same pass; None forms all logits."""
    gradients_stand: bool = False
    """Room for gradients is there all the time; else they come into being in a step's first backward."""
    loss_words: int | None = None
    """Words whose logits exist at once in such a tile, where the head is frozen; None is the whole vocabulary."""
    offloaded_weights: float = 0.0
    """Bytes of weights that wait in host memory in parts."""
    map_at_work: float = 0.0
    """Bytes of the largest linear map as it stands while its product is formed, where weights are packed."""
    optimizer_workspace: float = 0.0
    """Bytes that the optimizer needs during its step."""
    corpus_resident: bool = True
    """All tokens of the corpus are in host memory."""
    copies_stay: bool = True
    """Copies of trained weights that autocast makes in the compute dtype stay until the forward is over."""
    leaves_in: int | None = None
    """In so many parts a gradient leaves, of which this rank's goes to host memory with its norm; None: whole."""
    beside_head: float = 0.0
    """Bytes of gathered weights that stand beside a gathered head while layers go back, since a fused loss lets go of it last."""

    def sizes(self, facts: Facts, tokens: int) -> Sizes:
        """What the formulas of a layer's parts read, for so many tokens."""
        return Sizes(facts, tokens, self.value, self.hidden, packed=self.map_at_work > 0)

    def leaving(self, values: int) -> float:
        """Bytes of a gradient of so many values, while ranks exchange it: with a copy, or with what comes later, its part on the device
        again and in fp64."""
        whole = FP32 * values
        if self.leaves_in is None:
            return LEAVING * whole
        part = values / self.leaves_in
        return max(LEAVING * whole, whole + FP32 * part + FP64 * min(part, NORM_VALUES))

    def beside_trained(self, facts: Facts) -> "Step":
        """With everything that is trained there once more, in fp32: an average of it, or what it returns to."""
        copies = self.standing.trainable_copy + FP32 * facts.trainable_params
        return replace(self, standing=replace(self.standing, trainable_copy=copies))


@dataclass(frozen=True)
class Passes:
    """The passes of one optimizer step, as far as exchanges between ranks go."""

    count: int
    """Micro-batches."""
    forwards: float
    """Forward passes through the layers' attention in each, repeated ones included."""
    value: int
    """Bytes of a value of the compute dtype."""
    weights: float = 0.0
    """Bytes of weights that are needed whole in each, a layer's once for each pass over it."""


class Behind(Enum):
    """What of a step's work goes on while an exchange is under way."""

    nothing = "nothing"
    attention = "attention"
    last_backward = "last_backward"


@dataclass(frozen=True)
class Exchange:
    """What one rank exchanges with the others in an optimizer step."""

    what: str
    handed_bytes: float
    """Handed over to the library, as `exchanged_bytes` in metrics.jsonl counts."""
    link_bytes: float
    """That leave this rank."""
    behind: Behind


def summed(what: str, handed_bytes: float, ranks: int, behind: Behind) -> Exchange:
    """A sum over ranks for all of them: each sends 2(R − 1)/R of it (Patarasuk & Yuan 2009, the ring algorithm)."""
    return Exchange(what, handed_bytes, 2 * (ranks - 1) / ranks * handed_bytes, behind)


@dataclass(frozen=True)
class Applied:
    """Proof that an optimization acted."""

    count: int
    """On how many modules, parameters or other things; 0 is an error."""
    detail: str
    """What was counted, for people."""
    undo: Callable[[], None] | None = None
    """Restores what was touched; None where the original is gone (quantised weights)."""
    report: Callable[[], str] | None = None
    """What is known only once the run has used it."""

    @property
    def words(self) -> str:
        """What acted on how many, and what came of it so far."""
        later = f"; {self.report()}" if self.report else ""
        return f"{self.count} {self.detail}{later}"


@dataclass(frozen=True)
class OptimizationConfig:
    """Base of every optimization's options."""

    enabled: bool = False


class Optimization(ABC):
    """One switch of the `optimizations` group."""

    name: ClassVar[str]
    title: ClassVar[str]
    row: ClassVar[int]
    """Its number in the feature table."""
    stage: ClassVar[Stage]
    exactness: ClassVar[Exactness]
    claims: ClassVar[frozenset[Site]]
    source: ClassVar[str]
    """Paper or library that does the work."""
    Config: ClassVar[type[OptimizationConfig]] = OptimizationConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def excludes(self) -> Mapping[Site, str]:
        """Places that nobody else may occupy beside this, though it does not itself, and why."""
        return {}

    @abstractmethod
    def check(self, facts: Facts) -> str | None:
        """The reason why this cannot act on this model and machine, or None if it can."""

    def reshaped(self, model: ModelShape) -> ModelShape:
        """The model's shape with this active; as it is where this cannot act on it. Pure."""
        return model

    @abstractmethod
    def memory(self, step: Step, facts: Facts) -> Step:
        """The step with this optimization active. Pure."""

    def host_memory(self, step: Step, facts: Facts) -> float:
        """Pinned host memory that this takes under the whole executor, in bytes; `step` has everything active. Pure."""
        return 0.0

    def checkpoint_bytes(self, facts: Facts) -> float:
        """What a checkpoint holds for this besides weights and optimizer state, of all ranks together. Pure."""
        return 0.0

    def exchange(self, passes: Passes, facts: Facts) -> "Exchange | None":
        """What one rank exchanges with others in an optimizer step for this; None: nothing of its own. Pure."""
        return None

    @abstractmethod
    def apply(self, target: Any) -> Applied:
        """Act on the stage's target."""


@dataclass(frozen=True)
class Decision:
    """What became of one optimization in a run."""

    optimization: Optimization = field(repr=False)
    requested: bool
    active: bool
    reason: str
    """Why it is inactive although requested; empty otherwise."""

    @property
    def name(self) -> str:
        """Name of the optimization."""
        return self.optimization.name
