"""What ranks that share a sequence take besides under the streamed executor (elite/executor/streamed/rounds.py). Bytes, bytes a token.

Symbols as in `streamed.py`; n tokens of a rank, all rows together, R ranks, b keys of a block that goes round:

    rows                n·(HD(2v + 8) + 4H): queries and gradients of outputs; outputs, gradients of queries and log-sum-exps in fp32
    keys and values     n·2KD·v, whose places their gradients take: those come home summed
    ranks that meet     a ring's two blocks, b·2KD·v each, of two ranks one: the last has no next; three of sums, b·2KD·4 each
                        (all_gather: R + 1 and R); a kernel's gradients of half a block, which has early and late keys, b·HD·v;
                        of a chunk, dQ in fp32, O and a dQ; besides another O, or dQ in fp32 once more where rows leave the device
"""

from math import ceil

from elite.facts import Facts
from elite.optimizations.parts import FP32
from elite.optimizations.ring_attention import Variant
from elite.streaming import Place, Streaming


def passes(facts: Facts, layout: Streaming) -> int:
    """Blocks that a layer's chunks see while ranks meet."""
    return facts.sharing * _laps(facts, layout)


def waiting_row(facts: Facts, value: int) -> float:
    """What waits of a token while ranks meet, its keys and values aside."""
    heads = facts.model.num_attention_heads
    return heads * (facts.model.head_dim * (2 * value + 2 * FP32) + FP32)


def keys_row(facts: Facts, value: int) -> float:
    """A token's keys and values."""
    return 2.0 * value * facts.model.num_key_value_heads * facts.model.head_dim


def staged_row(facts: Facts, value: int, layout: Streaming) -> float:
    """What a meeting brings and takes of a token: what waits, each way."""
    keys = keys_row(facts, value) if layout.keys_values is Place.host else 0.0
    return 2 * (waiting_row(facts, value) + keys)


def meeting(facts: Facts, value: int, layout: Streaming, chunk: int, variant: Variant) -> float:
    """Device memory of the backward's meeting, rows and staging aside."""
    block = ceil(facts.micro_tokens / _laps(facts, layout))
    queries, keys = facts.model.num_attention_heads * facts.model.head_dim, facts.model.num_key_value_heads * facts.model.head_dim
    blocks, sums = (min(2, facts.sharing - 1), 3) if variant is Variant.ring else (facts.sharing + 1, facts.sharing)
    travelling = block * 2 * keys * (blocks * value + sums * FP32)
    another = value if layout.boundaries is Place.device else FP32
    return travelling + block * queries * value + chunk * queries * (FP32 + 2 * value + another)


def _laps(facts: Facts, layout: Streaming) -> int:
    return ceil(facts.micro_tokens / layout.block)
