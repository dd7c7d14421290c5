"""The parts of a decoder layer as memory sees them, each in plain torch; optimizations put their own in their place.

A part says what its forward leaves for its backward, the gradient that arrives, the gradient that leaves and what it needs meanwhile.
Whoever adds them up (elite/plan/memory.py) takes the moment at which most is alive: parts are never at their highest together.

Symbols: T tokens at hand, d hidden size, f MLP width, H query heads, K key/value heads, D head dimension, r adapter rank; v bytes of a
value of the compute dtype, h of a hidden state (fp32 where the weights are). Everything below is bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from elite.facts import FORMULA_GELU, Facts, LinearShape
from elite.optimizations.shapes import adapter_rank, is_gated, mlp_width

FP32 = 4
NUMBER_BYTES = 4
"""Of what is kept once a row: a scale, a mean, a log-sum-exp."""


@dataclass(frozen=True)
class Part:
    """One part of a decoder layer, for the tokens at hand."""

    name: str
    saved: float = 0.0
    """What its forward leaves for its backward, besides what earlier parts have left already."""
    whole_input: float = 0.0
    """Of that, the part's own input: nothing more where the layer's input is kept anyway."""
    scores: float = 0.0
    """Of that, attention matrices."""
    small: float = 0.0
    """Of that, what has too few values a token to be packed: statistics, an adapter's low rank."""
    wide_values: float = 0.0
    """Of that, values in fp32 where the compute dtype is narrower."""
    weights: float = 0.0
    """Of that, weights in the compute dtype, which autocast keeps through the whole forward."""
    keeps_input: bool = False
    """It saves the very tensor that it reads, so that whoever reads the same keeps nothing."""
    keeps_output: bool = False
    """Its output is among what it saves."""
    forward: float = 0.0
    """What its forward holds besides, its output included."""
    spared: float = 0.0
    """Of that, what it does without if nobody reads its output (a recomputation's last map)."""
    arrives: float = 0.0
    lets_go: bool = False
    """That gradient is gone by the highest moment of its backward, if nobody else has it."""
    leaves: float = 0.0
    work: float = 0.0
    """What its backward holds besides the gradients that arrive and leave."""
    waits: float = 0.0
    """Gradients that wait for a part further down: the residual stream's."""
    hands: float = 0.0
    """Bytes of a value of its output."""
    gradients: float = 0.0
    """Gradients of weights that its backward makes, where weights themselves are trained."""
    wide: bool = False
    """It belongs to the MLP."""
    late: float = 0.0
    """Of `work`, gradients that are converted to narrower ones while what is saved is still there. What is recomputed, or packed, is
    handed out once and gone by then."""

    @property
    def backward(self) -> float:
        """Gradients and scratch at the highest moment of its backward."""
        return self.arrives + self.leaves + self.work + self.waits


@dataclass(frozen=True)
class Sizes:
    """What the formulas read."""

    facts: Facts
    tokens: int
    """T."""
    value: int
    """v."""
    hidden: int
    """h."""
    packed: bool = False
    """Whether linear maps are stored in few bits: each stands there in the compute dtype while its product is formed."""

    @property
    def d(self) -> int:
        """Hidden size."""
        return self.facts.model.hidden_size

    @property
    def queries(self) -> int:
        """HD."""
        return self.facts.model.num_attention_heads * self.facts.model.head_dim

    @property
    def keys(self) -> int:
        """KD."""
        return self.facts.model.num_key_value_heads * self.facts.model.head_dim

    @property
    def f(self) -> int:
        """MLP width."""
        return mlp_width(self.facts)

    @property
    def half(self) -> bool:
        """Whether autocast is on."""
        return self.value < FP32

    @property
    def trains_weights(self) -> bool:
        """Whether the weights themselves are trained, not adapters."""
        return self.facts.adapter == "full"

    @property
    def on_cuda(self) -> bool:
        """Whether autocast's rules are CUDA's: norms and powers in fp32."""
        return self.facts.device.kind == "cuda"


Maps = Callable[[Sizes, Sequence[LinearShape], float, bool], Part]
"""Linear maps of one input: (sizes, maps, bytes of a value of that input, whether an earlier part keeps it)."""


@dataclass(frozen=True)
class LayerForm:
    """How the parts of a layer are computed."""

    norm: Callable[[Sizes], Part]
    maps: Maps
    rotary: Callable[[Sizes], Part]
    attention: Callable[[Sizes, bool], Part]
    """(sizes, whether what it gives has to be copied into the order of tokens)"""
    activation: Callable[[Sizes], Part]
    mlp_tile: int | None = None
    """Tokens of an MLP at once, each tile checkpointed."""
    packed: bool = False
    """Documents are attended one by one, and what they give is put together."""
    turned_in_place: bool = False
    """Queries and keys lie as the projections left them, also where a part of each head is turned."""
    keeps_masks: bool = True
    """A dropout before the residual stream keeps what it dropped, a byte a value."""


def plain_norm(s: Sizes) -> Part:
    """RMS norm as a chain of operations in fp32; LayerNorm as one, which CUDA's autocast takes to fp32."""
    wide, rms = FP32 * s.d * s.tokens, is_gated(s.facts)
    converted = s.hidden < FP32 and (rms or (s.half and s.on_cuda))
    kept = wide if converted else s.hidden * s.d * s.tokens
    numbers = (1 if rms else 2) * NUMBER_BYTES * s.tokens
    # The weight of an RMS norm is trained and keeps the normalised input.
    normalised = wide if rms and s.trains_weights else 0
    hands = s.hidden if rms or not converted else FP32
    arrives, leaves = hands * s.d * s.tokens, s.hidden * s.d * s.tokens
    return Part(
        "norm",
        saved=kept + numbers + normalised,
        small=numbers,
        wide_values=(kept if converted else 0) + normalised,
        whole_input=0.0 if converted else kept,
        forward=2 * wide if rms else arrives,
        arrives=arrives,
        leaves=leaves,
        # Five in fp32 when the square goes back: through the product with the scale, through the mean, x, 2x, and their product;
        # the first is added to the stream's gradient where the two are of one dtype.
        work=max(0, (5 if converted else 4) * wide - arrives - leaves) if rms else wide if converted else 0,
        hands=hands,
    )


def plain_maps(s: Sizes, maps: Sequence[LinearShape], read: float, kept: bool) -> Part:
    """peft's adapted maps, or maps whose weights are trained, all or some."""
    if s.facts.adapter == "converted":
        return _partly_trained_maps(s, maps, read, kept)
    return _trained_maps(s, maps, read, kept) if s.trains_weights else _adapted_maps(s, maps, read, kept)


def unpacked(s: Sizes, maps: Sequence[LinearShape]) -> float:
    """Of maps that go back last to first, what the highest moment holds of a packed weight, less the gradients that are gone by then."""
    highest, gone = 0.0, 0.0
    for linear in reversed(maps) if s.packed else ():
        highest = max(highest, s.value * linear.inputs * linear.outputs - gone)
        gone += s.value * linear.outputs * s.tokens
    return highest


def let_go(s: Sizes, maps: Sequence[LinearShape]) -> float:
    """Gradient of the output that is gone when the input's is added up: the last map's, unless the residual stream has the same tensor."""
    joins = len(maps) == 1 and maps[0].outputs == s.d and not s.facts.model.residual_dropout
    return 0.0 if joins else s.value * maps[-1].outputs * s.tokens


def _inputs(s: Sizes, maps: Sequence[LinearShape], read: float, kept: bool) -> float:
    """Inputs that maps keep: each its own conversion, or all the one tensor."""
    copies = len(maps) if read != s.value else 0 if kept else 1
    return copies * maps[0].inputs * s.value * s.tokens


def _outputs(s: Sizes, maps: Sequence[LinearShape]) -> float:
    return sum(m.outputs for m in maps) * s.value * s.tokens


def _adapted_maps(s: Sizes, maps: Sequence[LinearShape], read: float, kept: bool) -> Part:
    rank, tokens = adapter_rank(s.facts), s.tokens
    into, last = read * maps[0].inputs * tokens, maps[-1].outputs * s.value * tokens
    converted = s.value * rank * sum(m.inputs + m.outputs for m in maps) if s.half else 0
    arrives = _outputs(s, maps)
    own = _inputs(s, maps, read, kept)
    # Of the map that goes back first: its gradients in fp32, and what it kept.
    first = rank * (maps[-1].inputs + maps[-1].outputs)
    kept_by_first = own / len(maps) + s.value * (rank * tokens + (first if s.half else 0))
    # First the scaled gradient. Then the input's gradients through base and adapter and their sum, when nobody reads the map's output
    # gradient any more, nor what it kept.
    work = max(last, 3 * into - kept_by_first - let_go(s, maps)) - into
    # A packed weight is unpacked for the base's, once the adapter's is there.
    work = max(work, into + unpacked(s, maps) - kept_by_first) if s.packed else work
    return Part(
        "maps",
        saved=own + len(maps) * rank * s.value * tokens + converted,
        small=len(maps) * rank * s.value * tokens,
        weights=converted,
        # The base's output, the adapter's scaled one, their sum.
        forward=arrives + 2 * last + (into if read != s.value else 0),
        # A recomputation ends with the last tensor that is saved, the adapter's low-rank values.
        spared=last,
        arrives=arrives,
        lets_go=True,
        leaves=into,
        work=work + FP32 * first,
        gradients=FP32 * rank * sum(m.inputs + m.outputs for m in maps),
        keeps_input=read == s.value,
    )


def _trained_maps(s: Sizes, maps: Sequence[LinearShape], read: float, kept: bool) -> Part:
    into, weights = read * maps[0].inputs * s.tokens, [m.inputs * m.outputs for m in maps]
    arrives = _outputs(s, maps)
    last = maps[-1].outputs * s.value * s.tokens
    converted = s.value * sum(weights) if s.half else 0
    own = _inputs(s, maps, read, kept)
    # The gradient of the weight beside that of the input, then its conversion, when the map's input and weight are gone.
    largest = max(weights)
    beside = s.value * (largest + (maps[0].inputs * s.tokens if read != s.value else 0))
    work = max(beside, FP32 * largest - own / len(maps)) if s.half else float(beside)
    return Part(
        "maps",
        saved=own + converted,
        weights=converted,
        gradients=FP32 * sum(weights),
        forward=arrives + (into if read != s.value else 0),
        arrives=arrives,
        leaves=into,
        keeps_input=read == s.value,
        work=max(work, 2 * into - last if len(maps) > 1 else 0.0),
    )


def _partly_trained_maps(s: Sizes, maps: Sequence[LinearShape], read: float, kept: bool) -> Part:
    """Some maps are trained, the others frozen and so keep nothing."""
    trained, whole = [m for m in maps if m.trained], _trained_maps(s, maps, read, kept)
    if trained:
        some = _trained_maps(s, trained, read, kept)
        return replace(whole, saved=some.saved, weights=some.weights, gradients=some.gradients)
    work = max(0.0, 2 * whole.leaves - maps[-1].outputs * s.value * s.tokens) if len(maps) > 1 else 0.0
    return replace(whole, saved=0.0, weights=0.0, gradients=0.0, keeps_input=False, work=work)


def plain_rotary(s: Sizes) -> Part:
    """q cos + rotate(q) sin."""
    turned = s.value * (s.queries + s.keys) * s.tokens
    return Part("rotary", forward=2 * turned, arrives=turned, leaves=turned, work=s.value * 2 * s.queries * s.tokens)


def scores_attention(s: Sizes, copied: bool) -> Part:
    """Softmax of all scores, fp32 and in the compute dtype, keys and values expanded to the query heads."""
    matrix = s.facts.model.num_attention_heads * s.facts.context * s.tokens
    expanded = 2 * (s.queries - s.keys) * s.value * s.tokens
    # The mask, a byte each, is one for all heads.
    kept = matrix * (FP32 + s.value if s.half else FP32) + s.facts.context * s.tokens + expanded
    inputs = s.value * (s.queries + 2 * s.keys) * s.tokens
    return Part(
        "attention",
        saved=inputs + kept,
        scores=kept,
        small=s.facts.context * s.tokens,
        wide_values=FP32 * matrix if s.half else 0.0,
        forward=2 * FP32 * matrix,
        arrives=s.value * s.queries * s.tokens,
        leaves=inputs + expanded,
        # Gradient of the weights, of the scores, a copy.
        work=3 * FP32 * matrix,
    )


def plain_activation(s: Sizes) -> Part:
    """Activation and product of a gated MLP, or the activation of a plain one; GELU written out (Phi) keeps its four factors."""
    unit = s.f * s.tokens
    if is_gated(s.facts):
        return _activation(3 * s.value * unit, s.value * unit, leaves=2 * s.value * unit, hands=s.value)
    if s.facts.model.model_type not in FORMULA_GELU:
        return _activation(s.value * unit, s.value * unit, leaves=s.value * unit, hands=s.value)
    # CUDA's autocast takes the power to fp32, and three of the four factors with it.
    widened = FP32 if s.half and s.on_cuda else s.value
    wide, late = (3 * widened * unit, s.value * unit) if widened > s.value else (0.0, 0.0)
    kept = (3 * widened + s.value) * unit
    # The gradients of both factors of the product; that of half the input is made in fp32 and then converted.
    work = widened * unit + late
    return _activation(kept, widened * unit, leaves=widened * unit, work=work, hands=widened, wide_values=wide, late=late)


def _activation(saved: float, out: float, **more: float) -> Part:
    return Part("activation", saved, forward=out, arrives=out, wide=True, **more)  # type: ignore[arg-type]


PLAIN = LayerForm(plain_norm, plain_maps, plain_rotary, scores_attention, plain_activation)
