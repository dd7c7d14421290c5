"""What a step copies between device and host, or disk: seconds in each direction, of one micro-batch.

Symbols as in `streamed.py`. A row is what waits elsewhere of one token.

    a layer forward         its input comes, its output goes; attention output and log-sum-exp go where they are kept
    a layer backward        its input and the gradient of its output come, the gradient of its input goes; kept outputs come
    keys, values on host    a chunk's forward reads all keys before it, its backward besides reads and writes their gradients
    ranks share sequences   queries and outputs come for each block of keys that comes round, and go; in the backward with their gradients
    a journal               what a layer writes is on the disk, and hashed, before the next one begins: hidden by nothing, so times err on
                            the long side; and what it adds to the gradients
    weights streamed        a layer's weights come once a sweep
    checkpoint offload      a layer's input goes in the forward and comes in the backward
    parts on the host       a rank's part of the weights comes once a pass, the gradient of its part goes in the backward
"""

from dataclasses import dataclass, fields

from elite.facts import Facts, Rates
from elite.optimizations.contract import Decision
from elite.optimizations.shapes import stream_value_bytes
from elite.optimizations.zero_2 import active_zero
from elite.plan.across import passes
from elite.plan.memory import folded
from elite.streaming import VALUE_BITS, BoundaryEncoding, Keep, Place, Streaming, WeightPlace

GRADIENT_BYTES = 4
"""Gradients of keys and values are added up in fp32."""
SUM_BYTES = 4
"""So are outputs of attention and gradients of queries, while blocks of keys come from other ranks."""
LSE_BYTES = 4
RESULT_BYTES = 4
"""A trained parameter's gradient, in fp32."""
HASH_BYTES_PER_S = 1e9
"""SHA-256 on one core (assumption)."""


@dataclass(frozen=True)
class Copies:
    """Seconds; what comes and what goes is under way at the same time, so the longer of the two counts."""

    forward: float = 0.0
    backward: float = 0.0
    flushed: float = 0.0
    """Of a journal; nothing else is under way meanwhile."""
    forward_ahead: float = 0.0
    """Of `forward`, what comes while another layer is computed, however many chunks there are: weights."""
    backward_ahead: float = 0.0

    def beside(self, others: "Copies") -> "Copies":
        """Both, one after the other."""
        return Copies(*(getattr(self, f.name) + getattr(others, f.name) for f in fields(self)))


def offloaded(facts: Facts, rates: Rates, value: int) -> Copies:
    """Of checkpoint offload."""
    moved = facts.model.num_hidden_layers * facts.model.hidden_size * stream_value_bytes(value, facts) * facts.micro_tokens
    return Copies(moved / rates.to_host_bytes_per_s, moved / rates.to_device_bytes_per_s)


def parts(facts: Facts, decisions: tuple[Decision, ...], rates: Rates, sweeps: float) -> Copies:
    """Of weights and gradients that ranks divide, where the host keeps their parts; `sweeps`: as in `streamed`."""
    zero = active_zero(decisions)
    if zero is None or not zero.offloads:
        return Copies()
    weights = folded(facts, decisions).offloaded_weights / rates.to_device_bytes_per_s
    own = RESULT_BYTES * facts.trainable_params / facts.device.count if zero.config.offload_optimizer else 0.0
    return Copies(sweeps * weights, max(weights, own / rates.to_host_bytes_per_s))


def streamed(facts: Facts, rates: Rates, layout: Streaming, value: int, sweeps: float) -> Copies:
    """Of the streamed executor.

    Args:
        value: bytes of a number in the compute dtype.
        sweeps: passes forward through all layers, the first one included.
    """
    comes, goes = rates.to_device_bytes_per_s, rates.to_host_bytes_per_s
    if layout.boundaries is Place.disk:
        comes, goes = min(comes, rates.disk_read_bytes_per_s), min(goes, rates.disk_write_bytes_per_s)
    model, tokens = facts.model, facts.micro_tokens
    hidden, keys = model.hidden_size * stream_value_bytes(value, facts), 2 * model.num_key_value_heads * model.head_dim
    exact = layout.encoding is BoundaryEncoding.exact
    kept = hidden if exact else model.hidden_size * VALUE_BITS[layout.encoding] / 8
    outputs = 0.0
    if layout.keep is Keep.attention:
        outputs = model.num_attention_heads * (model.head_dim * value + LSE_BYTES)
        outputs += keys * value if layout.keeps_keys(keys * value, hidden) else 0
    near = layout.boundaries is Place.device
    into, out = (0.0, 0.0) if near else (tokens * hidden / comes, tokens * (kept + outputs) / goes)
    back_into, back_out = (0.0, 0.0) if near else (tokens * (kept + hidden + outputs) / comes, tokens * hidden / goes)
    if facts.sharing > 1:
        more = _while_ranks_meet(facts, layout, value)
        if not near:
            comes, goes = rates.to_device_bytes_per_s, rates.to_host_bytes_per_s
            into, out = into + more.forward[0] / comes, out + more.forward[1] / goes
            back_into, back_out = back_into + more.backward[0] / comes, back_out + more.backward[1] / goes
    elif layout.keys_values is Place.host:
        # All chunks together read half of chunks × S keys.
        read = facts.micro_batch * facts.context**2 / 2 / layout.chunk * keys
        into += read * value / rates.to_device_bytes_per_s
        back_into += read * (value + GRADIENT_BYTES) / rates.to_device_bytes_per_s
        back_out += read * GRADIENT_BYTES / rates.to_host_bytes_per_s
    layers, weights = model.num_hidden_layers, 0.0
    if layout.weights is WeightPlace.streamed:
        weights = model.linear_params / layers * value / rates.to_device_bytes_per_s
    flushed = 0.0
    if layout.journal:
        written = tokens * (layers * (kept + outputs) + (layers + 2) * hidden) + RESULT_BYTES * facts.trainable_params
        flushed = written / rates.disk_write_bytes_per_s + written / HASH_BYTES_PER_S
    rows = max(into, out), max(back_into, back_out)
    both = max(into + weights, out), max(back_into + weights, back_out)
    forward, backward = sweeps * layers * both[0], layers * both[1]
    return Copies(forward, backward, flushed, forward - sweeps * layers * rows[0], backward - layers * rows[1])


@dataclass(frozen=True)
class _Meeting:
    """Bytes that come and go in one layer."""

    forward: tuple[float, float]
    backward: tuple[float, float]


def _while_ranks_meet(facts: Facts, layout: Streaming, value: int) -> _Meeting:
    """As if every chunk saw every block, which some do not: times err on the long side."""
    blocks, row = passes(facts, layout), facts.micro_tokens * facts.model.num_attention_heads * facts.model.head_dim
    # Queries and outputs, once for each block; queries once before it, outputs once after it.
    forward = row * (blocks * (value + SUM_BYTES) + SUM_BYTES), row * (blocks * SUM_BYTES + value)
    kept = layout.keep is Keep.attention
    again = (0.0, 0.0) if kept else forward
    # Queries, outputs and both gradients; before, queries and outputs' gradients go; after, queries' gradients come.
    into = row * (blocks * (2 * value + (value if kept else SUM_BYTES) + SUM_BYTES) + SUM_BYTES)
    return _Meeting(forward, (into + again[0], row * (blocks * SUM_BYTES + 2 * value) + again[1]))
