"""How long a step takes: what each kind of operation needs at that kind's rate. Times are for one rank; all ranks work alike.

Symbols as in `memory.py`. A multiply-add is two operations. Causal attention is counted once, at half of S²: 2·2·HD·S²/2 a
sequence and layer for scores and weighted sum; a layer with a window counts what its queries see. Packed documents attend less than
that, so times err on the long side.

A step is a forward and a backward phase, the latter with what is computed again. In each the device computes, the host hands it its
operations and copies go to and from host memory, all at once: the longest of the three decides.

    linear maps, head       operations over the rate of matrix products
    attention               operations over its kernel's rate; a causal square of n tokens reaches n/(n + n₀) of it
    adapters, elementwise   bytes moved (`traffic.py`) over the device's bandwidth
    host                    operations handed over (`launches.py`) times the host's time for one
    copies                  bytes between host and device over the link's rate
    exchange                bytes between ranks over the rate of the link between GPUs, less what hides them (`exchange.py`)

The constants, and where each was measured, stand in `rates.py`, `traffic.py` and `launches.py`.
"""

from dataclasses import dataclass, fields
from math import ceil

from elite.facts import Facts
from elite.loss_tiles import tile_tokens
from elite.optimizations.contract import Behind, Decision, Exchange, Site
from elite.optimizations.parts import FP32
from elite.optimizations.shapes import PARALLEL_BLOCKS, layer_maps, split
from elite.optimizations.zero_2 import active_zero
from elite.plan import launches, traffic
from elite.plan.copies import Copies, offloaded, parts, streamed
from elite.plan.exchange import exposed_s
from elite.plan.memory import folded
from elite.plan.rates import HOST_UPDATE_BYTES_PER_S, UPDATE_8BIT_FLOPS, attention_of, products_share, rates_of
from elite.streaming import Streaming

ATTENTION_BACKWARD = 2.5
"""Five matrix products against the forward's two (Dao 2023): scores are recomputed."""
UNFUSED_SCORE_VALUES = 30.0
"""Values read and written for a score of unfused attention, forward and backward: products, mask, softmax and dropout (fitted to
ablation_smollm2_4k.json and ablation_smollm2_16k.json, which attend so in fp32 without `flash_attention`)."""
OVERLAP = {False: 2.5, True: 4.0}
"""Whether streamed, and the exponent by which the device's and the host's time add up: 1 where they take turns, infinite where they overlap
wholly (fused_steps.json and first_gpu.json: Phi-2 at 4,096 tokens, whose steps take longer than either). One chunk is like another, so that
the host is ahead for longer (calibration_eleventh.json, whose host was calm for most steps)."""
RESIDUAL_OUTPUTS = frozenset({"down_proj", "fc2"})
"""Maps whose output need not be computed again (elite/optimizations/functions/unread.py), by their last name."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what takes them; they sum to `total`."""

    linear_maps: float = 0.0
    """Of the layers, forward and backward."""
    adapters: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    """Norms, rotary embedding, activations, residual sums, layouts."""
    head_and_loss: float = 0.0
    computed_again: float = 0.0
    """Passes forward besides the first one, everything in them."""
    optimizer: float = 0.0
    exposed_copies: float = 0.0
    """Copies between host and device, as far as nothing hides them."""
    waiting_for_host: float = 0.0
    """The host hands over operations more slowly than the device carries them out."""
    exchange: float = 0.0
    """Between ranks, as far as nothing hides it."""

    @property
    def total(self) -> float:
        """Sum of all."""
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, float]:
        """Seconds by name, in declaration order."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def _linear(facts: Facts) -> float:
    """Operations of one forward pass through the layers' linear maps, a token."""
    return 2.0 * facts.model.linear_params


def _head(facts: Facts) -> float:
    return 2.0 * facts.model.hidden_size * facts.model.vocab_size


def _adapters(facts: Facts) -> float:
    return 2.0 * facts.trainable_params if facts.adapter == "lora" else 0.0


def _attention(facts: Facts) -> float:
    """Operations of causal attention in one forward pass, a token, all layers."""
    model = facts.model
    return 4.0 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * model.keys_seen(facts.context)


def _projected_twice(facts: Facts) -> float:
    """Operations of one pass forward that are carried out twice, a token: queries, keys and values, before ranks that share a sequence
    meet and again after it (elite/executor/streamed/rounds.py)."""
    if facts.executor != "streamed" or facts.sharing == 1:
        return 0.0
    projections, *_ = layer_maps(facts)
    return 2.0 * facts.model.num_hidden_layers * sum(linear.inputs * linear.outputs for linear in projections)


def _frozen_backward(facts: Facts) -> float:
    """Backward over forward in the base's linear maps: gradient of the input, and of the weight where it is trained."""
    if facts.adapter == "converted":
        return 1.0 + facts.model.trained_linear_params / facts.model.linear_params
    return 1.0 if facts.adapter == "lora" else 2.0


def recomputed(decisions: tuple[Decision, ...]) -> tuple[float, float]:
    """Forward passes besides the first one, of the layers' linear maps and of their attention, under the whole executor."""
    again = traffic.active(decisions, Site.LAYER_ACTIVATIONS)
    return (1.0, 1.0) if again else (0.0, 0.0)


def step_flops(facts: Facts, again: tuple[float, float], accumulation: int) -> float:
    """Operations that one rank carries out in one optimizer step.

    Args:
        again: forward passes besides the first one, of linear maps and of attention.
    """
    base, adapters, attention = _linear(facts) + _head(facts), _adapters(facts), _attention(facts)
    per_token = base * (1 + _frozen_backward(facts)) + 3 * adapters + attention * (1 + ATTENTION_BACKWARD)
    per_token += again[0] * (_linear(facts) + adapters) + again[1] * attention + (1 + again[0]) * _projected_twice(facts)
    return per_token * facts.micro_tokens * accumulation


def step_time(
    facts: Facts,
    decisions: tuple[Decision, ...],
    again: tuple[float, float],
    accumulation: int,
    layout: Streaming | None = None,
    exchanges: tuple[Exchange, ...] = (),
) -> StepTime:
    """Predicted duration of one optimizer step.

    Args:
        again: as in `step_flops`.
        layout: of the streamed executor.
        exchanges: with other ranks.
    """
    clock = _Clock(facts, decisions, layout)
    # Sweeps forward between kept boundaries come before a layer's own backward, which computes the layer once more.
    sweeps = again[0] - 1 if layout else 0.0
    forward, backward = clock.forward(), clock.backward()
    pass_s = sum(forward.values())
    swept, repeated = sweeps * pass_s, clock.repeated(again[0] - sweeps, again[1] - sweeps)
    head, copies = clock.head(), clock.copies(1 + sweeps)
    handed = launches.phases(facts, decisions, layout, again[0])
    # Rows of one chunk are under way behind another's computation; weights of a layer behind another layer's in any case.
    alone = layout is not None and launches.chunks(facts, layout) == 1
    rows = (copies.forward - copies.forward_ahead, copies.backward - copies.backward_ahead) if alone else (0.0, 0.0)
    overlap = OVERLAP[layout is not None]
    ahead = _wait(overlap, pass_s + swept + head, handed.forward * clock.rates.operation_s, copies.forward, rows[0])
    behind = _wait(overlap, sum(backward.values()) + repeated, handed.backward * clock.rates.operation_s, copies.backward, rows[1])
    found = {name: forward[name] + backward[name] for name in forward}
    found |= {"head_and_loss": head, "computed_again": swept + repeated}
    found |= {"exposed_copies": ahead[0] + behind[0] + copies.flushed, "waiting_for_host": ahead[1] + behind[1]}
    attended = accumulation * ((1 + again[1]) * forward["attention"] + backward["attention"])
    between = exposed_s(exchanges, facts.device, {Behind.attention: attended, Behind.last_backward: sum(backward.values()) + repeated})
    return StepTime(**{name: accumulation * seconds for name, seconds in found.items()}, optimizer=clock.update(), exchange=between)


def _wait(overlap: float, device_s: float, host_s: float, copies_s: float, alone_s: float) -> tuple[float, float]:
    """Seconds that the device stands still in a phase: for copies, `alone_s` of which nothing hides, and for the host.

    Stretches in which the device waits for the host alternate with others in which the host is ahead, so the longer of both is too
    little and their sum too much (`OVERLAP`).
    """
    busy = (device_s**overlap + host_s**overlap) ** (1 / overlap)
    return alone_s + max(0.0, copies_s - alone_s - busy), busy - device_s


class _Clock:
    """Seconds of the parts of one micro-batch on the device."""

    def __init__(self, facts: Facts, decisions: tuple[Decision, ...], layout: Streaming | None) -> None:
        self._facts, self._decisions, self._layout = facts, decisions, layout
        self.rates = rates_of(facts.device)
        self._half = traffic.active(decisions, Site.COMPUTE_DTYPE)
        share = products_share(facts.model.hidden_size, streamed=layout is not None)
        self._flops_per_s = share * self.rates.matmul_flops_per_s if self._half else self.rates.fp32_flops_per_s
        self._layer = traffic.layer(facts, decisions) * facts.model.num_hidden_layers
        self._adapters = traffic.adapters(facts, decisions) * facts.model.num_hidden_layers

    def forward(self) -> dict[str, float]:
        """One pass forward through all layers."""
        return {
            "linear_maps": self._products(_linear(self._facts) + _projected_twice(self._facts)) + self._dequantised(),
            "adapters": self._moved(self._adapters.forward) + self._products(_adapters(self._facts)),
            "attention": self._attended(backward=False),
            "elementwise": self._moved(self._layer.forward),
        }

    def backward(self) -> dict[str, float]:
        """One pass backward through all layers, nothing computed again."""
        return {
            "linear_maps": self._products(_linear(self._facts) * _frozen_backward(self._facts)) + self._dequantised(),
            "adapters": self._moved(self._adapters.backward) + self._products(2 * _adapters(self._facts)),
            "attention": self._attended(backward=True),
            "elementwise": self._moved(self._layer.backward),
        }

    def repeated(self, linear: float, attention: float) -> float:
        """What a layer's own backward computes again of its forward; `linear`, `attention`: how often."""
        once = self.forward()
        spared = self._products(self._unread())
        tiles = self._products(_mlp(self._facts)) if traffic.active(self._decisions, Site.MLP_FORWARD) else 0.0
        return linear * (once["linear_maps"] + once["adapters"] + once["elementwise"] - spared) + tiles + attention * once["attention"]

    def head(self) -> float:
        """Head and loss, forward and backward."""
        products = self._products(_head(self._facts) * (1 + _frozen_backward(self._facts)))
        made = self._loss_tiles() * traffic.HEAD_GRADIENT
        if self._facts.adapter != "lora":
            made += launches.chunks(self._facts, self._layout) * traffic.HEAD_CHUNK
        gradient = made * self._facts.model.embedding_params / self.rates.memory_bytes_per_s
        return products + gradient + self._moved(traffic.loss(self._facts, self._decisions))

    def _loss_tiles(self) -> int:
        """Tiles of tokens that add to a trained head's gradient."""
        facts, tokens = self._facts, self._facts.micro_tokens
        if facts.adapter == "lora":
            return 0
        if self._layout is not None:
            chunk = min(self._layout.chunk, facts.context)
            return ceil(tokens / chunk) * ceil(chunk / tile_tokens(facts.model.vocab_size))
        return ceil(tokens / (folded(facts, self._decisions).loss_tile or tokens))

    def copies(self, sweeps: float) -> Copies:
        """Between device and host; nothing on a CPU, which is both."""
        if self._facts.device.kind == "cpu":
            return Copies()
        value, divided = 2 if self._half else 4, parts(self._facts, self._decisions, self.rates, sweeps)
        if self._layout is not None:
            return streamed(self._facts, self.rates, self._layout, value, sweeps).beside(divided)
        off = traffic.named("checkpoint_offload", self._decisions)
        return offloaded(self._facts, self.rates, value).beside(divided) if off else divided

    def update(self) -> float:
        """The optimizer's step, of a rank's part where parameters are divided; in host memory with what comes back from there."""
        facts, zero = self._facts, active_zero(self._decisions)
        own = facts.trainable_params / (1 if zero is None else facts.device.count)
        in_8_bits = traffic.active(self._decisions, Site.OPTIMIZER_STATE)
        handed = 0.0 if facts.device.kind == "cpu" else launches.updates(facts, in_8_bits=in_8_bits) * self.rates.operation_s
        if in_8_bits:
            return max(handed, UPDATE_8BIT_FLOPS * own / self.rates.fp32_flops_per_s)
        moved = traffic.OPTIMIZER * own
        if zero is None or facts.device.kind == "cpu" or not zero.config.offload_optimizer:
            return max(handed, moved / self.rates.memory_bytes_per_s)
        back = 0.0 if folded(facts, self._decisions).offloaded_weights else FP32 * own
        return moved / HOST_UPDATE_BYTES_PER_S + back / self.rates.to_device_bytes_per_s

    def _products(self, flops_per_token: float) -> float:
        return flops_per_token * self._facts.micro_tokens / self._flops_per_s

    def _moved(self, bytes_per_token: float) -> float:
        return bytes_per_token * self._facts.micro_tokens / self.rates.memory_bytes_per_s

    def _dequantised(self) -> float:
        calls = launches.chunks(self._facts, self._layout)
        return calls * traffic.dequantised(self._facts, self._decisions) / self.rates.memory_bytes_per_s

    def _unread(self) -> float:
        """Operations a token of maps that need not be computed again, all layers."""
        if not traffic.active(self._decisions, Site.LORA_FORWARD):
            return 0.0
        names = RESIDUAL_OUTPUTS | ({"dense"} if self._facts.model.model_type in PARALLEL_BLOCKS else set())
        linears = (linear for linear in self._facts.model.layer_linears if linear.name.rsplit(".", 1)[-1] in names)
        return 2.0 * self._facts.model.num_hidden_layers * sum(linear.inputs * linear.outputs for linear in linears)

    def _attended(self, *, backward: bool) -> float:
        """One pass of attention through all layers."""
        facts, model = self._facts, self._facts.model
        flops = _attention(facts) * facts.micro_tokens * (ATTENTION_BACKWARD if backward else 1.0)
        if facts.executor == "whole" and not traffic.active(self._decisions, Site.ATTENTION) and facts.sharing == 1:
            scores = facts.micro_tokens * facts.context * model.num_attention_heads * model.num_hidden_layers
            # The masked half is computed, too.
            moved = scores * UNFUSED_SCORE_VALUES / 2 * (2 if self._half else 4)
            return 2 * flops / self._flops_per_s + moved / self.rates.memory_bytes_per_s
        kernel = attention_of(self.rates, model.head_dim)
        rate, half = (kernel.backward, kernel.backward_half) if backward else (kernel.forward, kernel.forward_half)
        if not self._half:
            rate *= self.rates.fp32_flops_per_s / self.rates.matmul_flops_per_s
        # Of S²/2 pairs, S·n/2 lie in causal squares of n tokens, which take 1 + half/n times as long: n drops out.
        return flops / rate * (1 + half / facts.context)


def _mlp(facts: Facts) -> float:
    """Operations of one forward pass through the MLPs, a token."""
    _, mlp = split(facts.model.layer_linears)
    return 2.0 * facts.model.num_hidden_layers * sum(linear.inputs * linear.outputs for linear in mlp)


def model_flops_per_token(facts: Facts) -> float:
    """Operations a token that the mathematics needs, forward and backward, whatever is recomputed: for MFU.

    Chowdhery et al. 2022, appendix B, with causal attention at half (6·L·H·D·S instead of 12) and, under LoRA, without the weight
    gradients of frozen maps.
    """
    base = (_linear(facts) + _head(facts)) * (1 + _frozen_backward(facts))
    return base + 3 * _adapters(facts) + 3 * _attention(facts)
